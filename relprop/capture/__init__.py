"""From an untouched nn.Module to a canonical graph: export, canonicalise, hoist row selections, lower."""

from relprop.capture.export import Captured, InputSpec, capture
from relprop.capture.lower import lower

__all__ = ["Captured", "InputSpec", "capture", "lower"]
