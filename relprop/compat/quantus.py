"""Quantus's `explain_func`: relevance for its metrics.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, x, y = load_model(), preprocess(bundled_scenes()["scene_2_6"].image[None]).numpy(), np.array([6])
>>> from relprop.compat.quantus import explain
>>> explain(model, x, y, method="attnlrp").shape
(1, 1, 64, 64)

With a metric: `PixelFlipping()(model=model, x_batch=x, y_batch=y, explain_func=explain)`; what `explain` takes by name
goes into `explain_func_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relprop.composites import Composite
from relprop.engine import compile
from relprop.errors import OptionError, TargetError

__all__ = ["explain"]


def explain(
    model: nn.Module,
    inputs: np.ndarray | Tensor,
    targets: np.ndarray | Tensor | int,
    *,
    method: str = "transformer_attribution",
    composite: str | Composite | None = None,
    method_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    precision: str = "highest",
    batch_size: int | str | None = None,
    device: Any = None,
) -> np.ndarray:
    """Relevance as Quantus's metrics take it: summed over channels, whose axis stays.

    Args:
        model: in evaluation mode.
        inputs: images [B, C, H, W] or token ids [B, N].
        targets: a class for each sample. [B], or an int
        method, composite, method_options, backend, precision: as `relprop.compile` takes them.
        batch_size: samples that are explained at a time.
        device: where the model is, as Quantus passes it on; the model's own by default.
    Returns:
        [B, 1, H, W] for images, [B, N] for token ids
    Raises:
        TargetError: the targets are no class per sample. OptionError: no model, or inputs of another type.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    first = next(model.parameters())
    if not isinstance(inputs, (np.ndarray, Tensor)):
        raise OptionError(f"inputs: expected an array or a tensor, got {type(inputs).__name__}")
    given = torch.as_tensor(inputs)
    given = given.to(device or first.device, first.dtype if given.is_floating_point() else torch.int64)
    if targets is None:
        raise TargetError(f"targets: expected an int or {len(given)} of them, got None")
    try:
        classes = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"targets: expected an int or {len(given)} of them, got {targets!r}") from None
    if classes.is_floating_point() or classes.ndim > 1 or (classes.ndim and len(classes) != len(given)):
        raise TargetError(
            f"targets: expected an int or {len(given)} of them, got {list(classes.shape)}, {classes.dtype}"
        )
    engine = compile(
        model,
        (given,),
        method=method,
        composite=composite,
        method_options=method_options,
        backend=backend,
        precision=precision,
    )
    found = engine(given, target=classes.expand(len(given)), batch_size=batch_size)
    answer = found.image_map().unsqueeze(1) if given.ndim == 4 else found.relevance
    return answer.cpu().numpy()
