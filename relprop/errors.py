"""The errors that relprop raises: one small tree, each also the built-in that a caller would expect.

Every message says what was expected, what came and, where there is one, the node and its module path.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RelpropError(Exception):
    """Base of every error that relprop raises on purpose."""


class ShapeError(RelpropError, ValueError):
    """A tensor's shape is not the expected one."""


class DTypeError(RelpropError, TypeError):
    """A tensor's dtype is not the expected one."""


class DeviceError(RelpropError, ValueError):
    """Tensors or modules lie on devices that do not fit together."""


class InputError(RelpropError, ValueError):
    """The model itself does not take the inputs that it is given."""


class TargetError(RelpropError, ValueError):
    """A target is out of range, of the wrong shape or of the wrong type."""


class OptionError(RelpropError, ValueError):
    """An option's name or value is not one that the method, rule or backend knows."""


class LayerIndexError(OptionError, IndexError):
    """A layer is asked for that the model does not have."""


class UnknownNameError(RelpropError, KeyError):
    """A method, composite, rule or backend of that name does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ModelStateError(RelpropError, RuntimeError):
    """The model is in a state that cannot be explained (training mode, mixed devices, changed weights)."""


class CaptureError(RelpropError, RuntimeError):
    """torch.export could not capture the model."""


class UnsupportedOpError(RelpropError, NotImplementedError):
    """Operations of the captured graph have no relevance rule."""


class UnsupportedTopologyError(RelpropError, NotImplementedError):
    """The method's read-out does not apply to a model of this structure."""


class BackendError(RelpropError, RuntimeError):
    """The backend asked for cannot run here."""


class NonFiniteError(RelpropError, ValueError):
    """An input holds NaN or infinity."""


class WeightsError(RelpropError, ValueError):
    """A weights file cannot be read or does not fit the model."""


class ImageError(RelpropError, ValueError):
    """A file is not an image that can be explained."""


class OutputError(RelpropError, OSError):
    """Results cannot be written where they were asked for."""


class MissingDependencyError(RelpropError, ImportError):
    """An optional dependency is needed and not installed."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Error for a name that is not registered, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {what}: expected one of {', '.join(names)}, got {name!r}{hint}")
