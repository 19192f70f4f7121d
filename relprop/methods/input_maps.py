"""Read-outs at the input: relevance of every pixel or token embedding, and gradient times input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from relprop.errors import UnsupportedTopologyError
from relprop.graph import Graph, Value
from relprop.methods.base import Reader, Reading, Readout, Requirements


@dataclass(frozen=True)
class InputMap(Readout):
    """A stream at the explained input, summed over channels.

    Args:
        stream: "relevance" or "gradient" (multiplied with the input).
        method: for messages.
    """

    stream: str
    method: str

    def require(self, graph: Graph) -> Requirements:
        """The stream at the one explained input."""
        value = entry_value(graph, self.method)
        return Requirements(values=((value, self.stream),))

    def reader(self) -> Reader:
        """A reader at the input."""
        return _AtInput(self.stream)


class _AtInput(Reader):
    def __init__(self, stream: str) -> None:
        self.stream = stream

    def finish(self, reading: Reading) -> Tensor:
        (value,) = {value for value, name in reading.streams if name == self.stream}
        found = reading.streams[value, self.stream]
        if self.stream == "gradient":
            found = found * reading.inputs[value].to(found.dtype)
        if found.ndim == 5:  # [T, B, C, H, W]
            return found.sum(2)
        return found.sum(-1) if found.ndim == 4 else found


def entry_value(graph: Graph, method: str) -> Value:
    """Where relevance leaves the model: a floating-point input, or the embedding of token ids.

    Raises:
        UnsupportedTopologyError: there is not exactly one.
    """
    found = [value for value in graph.explained if value.dtype.is_floating_point]
    found += [node.outputs[0] for node in graph.nodes if node.kind == "embedding" and node.role == "tokens"]
    if len(found) != 1:
        names = ", ".join(value.name for value in found) or "none"
        raise UnsupportedTopologyError(f"method {method!r}: expected one explained input, got {names}")
    return found[0]
