"""What a pass found, as the explanation that its caller gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relprop.capture import InputSpec
from relprop.execute import PassResult
from relprop.explanation import Explanation, TokenKinds, TokenLayout
from relprop.graph import Graph
from relprop.methods import Reading
from relprop.methods.topology import number_of_keys, patch_grid, token_origins
from relprop.program import Program

Shapes = Mapping[int, torch.Size]


def explained_names(graph: Graph) -> set[str]:
    """Placeholders of the inputs that are explained."""
    explained = {v.index for v in graph.explained}
    return {name for name, value in graph.inputs.items() if value.index in explained}


def explanation_of(result: PassResult, program: Program, inputs: Sequence[InputSpec]) -> Explanation:
    """One sample after the other, [B, ...], or [B, T, ...] where several targets were asked for.

    Args:
        inputs: of the captured model.
    """
    method, target, reading = program.method, result.target, result.reading

    def per_sample(found: Tensor) -> Tensor:
        found = found.expand(reading.targets, reading.batch, *found.shape[2:])
        return (found.transpose(0, 1) if target.several else found[0]).contiguous()

    shaped = per_sample(result.relevance)
    maps = {name: per_sample(found) for name, found in result.by_input.items()}
    paths = {spec.placeholder: spec.path for spec in inputs}
    row, origins = _row_layout(program, reading, result.shapes, shaped.shape[-1])
    layouts = _layouts(program, reading, result.shapes)
    if layouts:
        row = layouts.get(next(iter(result.by_input), next(iter(layouts))))
    index = target.index
    if index is not None and not target.several:
        index = index[:, 0]
    explained = [spec for spec in inputs if spec.placeholder in explained_names(program.graph)]
    if len(explained) == 1:
        maps = {explained[0].placeholder: shaped}
    return Explanation(
        relevance=shaped,
        relevances={spec.path: maps[spec.placeholder] for spec in explained if spec.placeholder in maps},
        logits=result.output,
        target=index,
        method=method.name,
        composite=program.composite.name,
        kinds=None if row is None else row.kinds,
        grid=None if row is None else row.grid,
        layouts={paths[name]: one for name, one in layouts.items() if name in maps},
        origins=tuple(paths.get(name, "") for name in origins),
        image_size=_image_size(program.graph, result.shapes),
        ledger=result.books,
        latents=result.latents,
        matrices={
            (paths.get(of, of), paths.get(on, on)): per_sample(found) for (of, on), found in result.matrices.items()
        },
    )


def _image_size(graph: Graph, shapes: Shapes) -> tuple[int, int] | None:
    """(H, W) of the explained image, None where none is."""
    image = next((v for v in graph.explained if v.rank == 4), None)
    return None if image is None else _size(shapes[image.index])


def _size(shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[-2]), int(shape[-1])


def _row_layout(
    program: Program, reading: Reading, shapes: Shapes, tokens: int
) -> tuple[TokenLayout | None, tuple[str, ...]]:
    """How the tokens of one row lie; where inputs are several, also which of them each comes from, by placeholder."""
    graph = program.graph
    if not program.requirements.profile or program.method.output != "tokens":
        return None, ()
    assert reading.profile is not None
    several = len(graph.explained) > 1
    names = {value.index: name for name, value in graph.inputs.items()}
    first = names[graph.explained[0].index]
    origins = token_origins(graph, graph.tokens.covering or graph.attention_sites()[0], lambda i: shapes[i])
    origins = origins or [first] * tokens
    if not several:
        origins = [None if name is None else first for name in origins]
    layout = _layout_of(graph, origins, reading.profile[..., :tokens], shapes)
    return layout, tuple(name or "" for name in origins) if several else ()


def _layout_of(graph: Graph, origins: Sequence[str | None], profile: Tensor, shapes: Shapes) -> TokenLayout:
    """Of tokens that come from these placeholders; None stands for a token of the model's own."""
    images = {name for name in origins if name and graph.inputs[name].rank == 4}
    plain = ["" if name is None else "patch" if name in images else "word" for name in origins]
    size = next((_size(shapes[graph.inputs[name].index]) for name in images), None)
    grid = None if size is None else patch_grid(graph, plain.count("patch"), size, shapes)
    return TokenLayout(TokenKinds(plain, profile), grid)


def _layouts(program: Program, reading: Reading, shapes: Shapes) -> dict[str, TokenLayout]:
    """How the tokens of each input lie that is a sequence of its own, by placeholder."""
    found, graph = {}, program.graph
    for name, site in program.readout.first_layers().items():
        tokens = number_of_keys(site, dict(shapes))
        origins = token_origins(graph, site, lambda i: shapes[i])
        own = [None if origin is None else name for origin in origins] if len(origins) == tokens else [name] * tokens
        found[name] = _layout_of(graph, own, program.readout.read_of(name, tokens, reading), shapes)
    return found
