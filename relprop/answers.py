"""What a pass found, as the explanation that its caller gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relprop.capture import InputSpec
from relprop.execute import PassResult
from relprop.explanation import Explanation, TokenKinds
from relprop.graph import Graph
from relprop.methods import Reading
from relprop.methods.topology import explained_tokens, patch_grid
from relprop.program import Program


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
    kinds, grid, size = _layout(program, reading, result.shapes, shaped.shape[-1])
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
        kinds=kinds if method.output == "tokens" else None,
        grid=grid if method.output == "tokens" else None,
        image_size=size,
        ledger=result.books,
        latents=result.latents,
        matrices={
            (paths.get(of, of), paths.get(on, on)): per_sample(found) for (of, on), found in result.matrices.items()
        },
    )


def _layout(
    program: Program, reading: Reading, shapes: Mapping[int, torch.Size], tokens: int
) -> tuple[TokenKinds | None, tuple[int, int] | None, tuple[int, int] | None]:
    """What tells the kinds of the tokens, the grid of patches, and the size of the input image."""
    graph = program.graph
    image = next((v for v in graph.explained if v.rank == 4), None)
    size = None if image is None else tuple(int(s) for s in shapes[image.index][-2:])
    if not program.requirements.profile:
        return None, None, size  # type: ignore[return-value]
    assert reading.profile is not None
    explained = explained_tokens(graph, graph.attention_sites()[0], lambda i: shapes[i]) or [True] * tokens
    plain = "patch" if image is not None else "word"
    grid = None if size is None else patch_grid(graph, sum(explained), size, shapes)  # type: ignore[arg-type]
    return TokenKinds(plain, explained, reading.profile[..., :tokens]), grid, size  # type: ignore[return-value]
