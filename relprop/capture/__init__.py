"""From an untouched nn.Module to a canonical graph: export, canonicalise, hoist row selections, lower."""

from relprop.capture.canonicalise import held_apart
from relprop.capture.export import Captured, InputSpec, capture
from relprop.capture.lower import lower

__all__ = ["Captured", "InputSpec", "capture", "held_apart", "lower"]
