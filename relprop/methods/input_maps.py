"""Read-outs at the input: relevance of every pixel or token embedding, and gradient times input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from relprop.errors import OptionError, UnsupportedTopologyError
from relprop.graph import Graph, Value
from relprop.methods.base import Reader, Reading, Readout, Requirements
from relprop.methods.topology import residual_tokens, self_attention_sites


@dataclass(frozen=True)
class InputMap(Readout):
    """A stream at the explained input, summed over channels.

    Args:
        stream: "relevance" or "gradient" (multiplied with the input).
        method: for messages.
        at: "input", or "tokens" for the sequence that the first attention layer reads, where position embeddings and
            class tokens still have their share.
        channels: "summed", or "kept" for an answer of the input's own shape.
        rows: "read" leaves out rows that the output does not read; "all" computes them, for latents of whole modules.
    """

    stream: str
    method: str
    at: str = "input"
    channels: str = "summed"
    rows: str = "read"

    @property
    def all_rows(self) -> bool:
        """Where rows are asked for that the output does not read."""
        return self.rows == "all"

    def require(self, graph: Graph) -> Requirements:
        """The stream at every explained input."""
        if self.at not in ("input", "tokens"):
            raise OptionError(f"at: expected 'input' or 'tokens', got {self.at!r}")
        if self.channels not in ("summed", "kept"):
            raise OptionError(f"channels: expected 'summed' or 'kept', got {self.channels!r}")
        if self.rows not in ("read", "all"):
            raise OptionError(f"rows: expected 'read' or 'all', got {self.rows!r}")
        if self.at == "tokens":
            return Requirements(values=((first_tokens(graph, self.method), self.stream),), latent_stream=self.stream)
        values = tuple((value, self.stream) for _, value in entries(graph))
        return Requirements(values=values, latent_stream=self.stream)

    def reader(self) -> Reader:
        """A reader at the inputs."""
        return _AtInput(self.stream, self.over_channels)

    def over_channels(self, found: Tensor) -> Tensor:
        """The answer of a stream at an input."""
        return over_channels(found) if self.channels == "summed" else found


class _AtInput(Reader):
    def __init__(self, stream: str, summed: Callable[[Tensor], Tensor]) -> None:
        self.stream, self.summed = stream, summed

    def finish(self, reading: Reading) -> Tensor:
        return self.summed(self.first(reading))

    def by_input(self, graph: Graph, reading: Reading) -> dict[str, Tensor]:
        values = [value for _, value in entries(graph) if (value, self.stream) in reading.streams]
        return by_name(graph, {value: self.summed(self._read(reading, value)) for value in values})

    def first(self, reading: Reading) -> Tensor:
        """The stream at the first input."""
        return self._read(reading, next(value for value, name in reading.streams if name == self.stream))

    def _read(self, reading: Reading, value: Value) -> Tensor:
        found = reading.streams[value, self.stream]
        if self.stream == "gradient":
            found = found * reading.inputs[value].to(found.dtype)
        return found


def over_channels(found: Tensor) -> Tensor:
    """Summed over the channels of pixels [T, B, C, H, W] or tokens [T, B, N, C]."""
    if found.ndim == 5:
        return found.sum(2)
    return found.sum(-1) if found.ndim == 4 else found


@dataclass(frozen=True)
class PositionedMap(InputMap):
    """Relevance at the input, and what positions keep of it.

    Args:
        positions: "added" to the token at each position (in an image spread over the patch's pixels, and over channels
            that are kept), "alone" or "left out".
    """

    positions: str = "added"

    def require(self, graph: Graph) -> Requirements:
        """The stream at the one explained input, and what positions keep."""
        choices = ("added", "alone", "left out")
        if self.positions not in choices:
            raise OptionError(f"positions: expected one of {', '.join(choices)}, got {self.positions!r}")
        return replace(only_one(super().require(graph), self.method), positions=True)

    def reader(self) -> Reader:
        """A reader at the input that knows of positions."""
        return _WithPositions(self.stream, self.over_channels, self.positions)


class _WithPositions(_AtInput):
    def __init__(self, stream: str, summed: Callable[[Tensor], Tensor], positions: str) -> None:
        super().__init__(stream, summed)
        self.positions = positions

    def finish(self, reading: Reading) -> Tensor:
        found, kept = self.first(reading), reading.positions
        if not kept or self.positions == "left out":
            return self.summed(found)
        longest = max(part.shape[-1] for part in kept)
        total = found.new_zeros(*found.shape[:2], longest)
        for part in kept:  # a rotation may leave out the class and register tokens in front
            total[..., longest - part.shape[-1] :] += part
        spread = _like(total, found)
        return self.summed(spread if self.positions == "alone" else found + spread)


def _like(positions: Tensor, found: Tensor) -> Tensor:
    """Each token's share spread evenly over its channels, in an image also over its patch's pixels.

    Args:
        positions: [T, B, N]
        found: whose shape is wanted, pixels [T, B, C, H, W] or tokens [T, B, N, C].
    """
    if found.ndim == 5:
        return (_over_pixels(positions, found) / found.shape[2]).unsqueeze(2).expand_as(found)
    return (positions / found.shape[-1]).unsqueeze(-1).expand_as(found)


def _over_pixels(positions: Tensor, pixels: Tensor) -> Tensor:
    """Each patch's share spread evenly over its pixels; class and register tokens, in front, are left out."""
    height, width = pixels.shape[-2:]
    for size in range(1, min(height, width) + 1):
        rows, columns = height // size, width // size
        if height % size == 0 == width % size and 0 <= positions.shape[-1] - rows * columns < 16:
            patches = positions[..., -rows * columns :].unflatten(-1, (rows, columns)) / size**2
            return patches.repeat_interleave(size, -2).repeat_interleave(size, -1)
    raise UnsupportedTopologyError(
        f"positions: expected one for each square patch of an image of {height} x {width}, got {positions.shape[-1]}"
    )


def first_tokens(graph: Graph, method: str) -> Value:
    """The sequence of tokens that the first attention layer reads. [B, N, C]

    Raises:
        UnsupportedTopologyError: attention layers do not share one sequence.
    """
    found = residual_tokens(graph, self_attention_sites(graph, method)[0])
    if found is None:
        raise UnsupportedTopologyError(f"method {method!r}: expected a first attention layer over tokens [B, N, C]")
    return found


def only_one(requirements: Requirements, method: str) -> Requirements:
    """The same requirements, of a read-out for one input.

    Raises:
        UnsupportedTopologyError: there are several.
    """
    if len(requirements.values) != 1:
        names = ", ".join(value.name for value, _ in requirements.values)
        raise UnsupportedTopologyError(f"method {method!r}: expected one explained input, got {names}")
    return requirements


def by_name(graph: Graph, maps: Mapping[Value, Tensor]) -> dict[str, Tensor]:
    """Maps at the values of `entries`, added up by input."""
    found: dict[str, Tensor] = {}
    for name, value in entries(graph):
        if value in maps:
            found[name] = found[name] + maps[value] if name in found else maps[value]
    return found


def entries(graph: Graph) -> list[tuple[str, Value]]:
    """Where relevance leaves the model, by explained input: the input itself, or embeddings of its token ids."""
    found: list[tuple[str, Value]] = []
    for name, value in graph.inputs.items():
        if all(value is not explained for explained in graph.explained):
            continue
        if value.dtype.is_floating_point:
            found.append((name, value))
        else:
            found += [(name, node.outputs[0]) for node in graph.nodes if node.attributes.get("ids") == name]
    return found
