"""Attention relevance in tiles: both streams and the walk through one layer, no tensor of queries times keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import CODES, HALF, Stabiliser, any_of, empty, is_aligned, stream_dtype, text_of

QK_RULES = {"half": 0, "positive": 1, "detached": 2}
EDGES = {"gradient_x_relevance": 1, "gradient_x_attention": 2, "relevance": 3, "attention": 4}
Wanted = tuple[bool, bool, bool]
Parts = tuple[Tensor | None, Tensor | None, Tensor | None]
_ALL: Wanted = (True, True, True)
_NONE: Wanted = (False, False, False)


@dataclass(frozen=True)
class AttentionStreams:
    """What leaves an attention layer; None where it was not wanted or nothing arrived.

    Attributes:
        gradients, relevances: of q, k and v. [T, B, H, Nq, d], [T, B, Hk, Nk, d], [T, B, Hk, Nk, dv]
        row: the walked row. [T, B, Nk]
    """

    gradients: Parts
    relevances: Parts
    row: Tensor | None

    def of_channels(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionStreams:
        """With as many channels as these have: none where `widened` gave them one."""

        def cut(parts: Parts) -> Parts:
            at_q, at_k, at_v = (
                None if part is None else part[..., : t.shape[-1]] for part, t in zip(parts, (q, k, v), strict=True)
            )
            return at_q, at_k, at_v

        return AttentionStreams(cut(self.gradients), cut(self.relevances), self.row)


def _rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, compute: torch.dtype) -> Tensor:
    """Checked, aligned, with a contiguous last axis; other strides and half precisions stay as they are."""
    _check_dtype(name, tensor, compute)
    if tensor.shape != shape:
        raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
    _check_device(name, tensor, like)
    return _readable(tensor)


def _check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Any of these, or a half precision."""
    if tensor.dtype not in (*dtypes, *HALF):
        raise DTypeError(f"{name}: expected {any_of((*dtypes, *HALF))}, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise DeviceError(f"{name}: expected a tensor on {like.device} as the others, got one on {tensor.device}")


def widened(tensor: Tensor) -> Tensor:
    """With one channel of zeros where a head has none: products over no channels are 0 then too."""
    return tensor if tensor.shape[-1] else tensor.new_zeros((*tensor.shape[:-1], 1))


def _readable(tensor: Tensor) -> Tensor:
    if tensor.is_neg() or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        return tensor.resolve_neg().contiguous()
    return tensor if is_aligned(tensor) else tensor.clone()


def _mask(mask: Tensor, shape: tuple[int, ...], like: Tensor, compute: torch.dtype) -> tuple[str, Tensor]:
    """The mask's name in the kernel and the mask expanded to [B, H, Nq, Nk]."""
    _check_dtype("mask", mask, torch.bool, compute)
    _check_device("mask", mask, like)
    fits = mask.dim() <= 4 and all(m in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ShapeError(f"mask: expected a shape that broadcasts to {text_of(shape)}, got {text_of(mask.shape)}")
    if mask.shape[-1:] != shape[-1:]:
        mask = mask.expand(*mask.shape[:-1], shape[-1])
    mask = _readable(mask)
    if mask.dtype == torch.bool:
        return "seen", mask.view(torch.uint8).expand(shape)
    return "bias", mask.expand(shape)


def _check_rank(name: str, tensor: Tensor, rank: int, axes: str) -> None:
    if tensor.dim() != rank:
        raise ShapeError(f"{name}: expected shape [{axes}], got {text_of(tensor.shape)}")


def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    output: Tensor | None = None,
    exact_output: bool = True,
    mask: Tensor | None = None,
    causal: bool = False,
    gradient: Tensor | None = None,
    relevance: Tensor | None = None,
    gradients_wanted: Wanted = _ALL,
    relevances_wanted: Wanted = _ALL,
    qk: str = "half",
    qk_stabiliser: Stabiliser = (0, 0.0),
    av_stabiliser: Stabiliser = (0, 0.0),
    edge: str | None = None,
    row: Tensor | None = None,
) -> AttentionStreams:
    """Gradient and relevance through O = A v, A = softmax(scale q kᵀ + mask), and row E, in memory linear in N.

    With s = R_O / stab(O): R_A = ½ A ⊙ (s vᵀ), R_v = ½ v ⊙ (Aᵀ s), s' = R_A / stab(q kᵀ), R_q = ½ q ⊙ (s' k),
    R_k = ½ k ⊙ (s'ᵀ q); E is the mean over heads of the edge's positive part. q, k, v and the streams are read through
    their strides, and not copied where their last axis is contiguous. Half precisions are converted tile by tile; what
    is computed is float32, or float64 where the streams are; every tensor is of that or of a half precision.

    Args:
        q: [B, H, Nq, d], float32 | bfloat16 | float16 | float64
        k: H is a multiple of Hk, whose heads are shared in order. [B, Hk, Nk, d]
        v: [B, Hk, Nk, dv]
        scale: of the products in the softmax
        output: O, needed with `relevance` and with `exact_output`. [B, H, Nq, dv]
        exact_output: whether O has the precision of its dtype; where it was rounded to less, the gradient's own O is
            computed anew
        mask: True where a key is seen, or a summand of the logits. broadcastable to [B, H, Nq, Nk]
        causal: query i sees the keys up to i
        gradient, relevance: the streams at O. [T, B, H, Nq, dv]
        gradients_wanted, relevances_wanted: of q, k and v
        qk: "half", "positive" (z⁺ shares of q kᵀ, 0 where z⁺ is 0) or "detached" (R_v is v ⊙ (Aᵀ s), nothing for q, k)
        qk_stabiliser, av_stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        edge: a name of `EDGES`; None for no walk
        row: the row to multiply with E; its T may be 1. [T, B, Nq]
    Returns:
        the streams at q, k and v, and the row. Same bits for any number of threads.
    Conservation:
        a query that sees no key absorbs what arrives there
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3; tiles as in FlashAttention (Dao et al., NeurIPS 2022).
    """
    if not q.is_cpu:
        raise DeviceError(f"q: expected a tensor on the cpu, got one on {q.device}")
    if qk == "detached":
        relevances_wanted = (False, False, relevances_wanted[2])
    layer = prepared(q, k, v, output, mask, gradient, relevance, row, qk, edge)
    sizes, targets = layer.sizes, layer.targets
    made: dict[str, Parts] = {}
    results: dict[str, Tensor] = {}
    for name, stream, wanted in (
        ("gradient", gradient, gradients_wanted),
        ("relevance", relevance, relevances_wanted),
    ):
        made[name] = (None, None, None) if stream is None else _outputs(layer, wanted)
        results |= {f"{name}_{part}": t for part, t in zip("qkv", made[name], strict=True) if t is not None}
    walked = None
    if edge is not None:
        walked = results["row_out"] = torch.empty(len(layer.tensors["row"]), sizes[0], sizes[4], dtype=layer.compute)
    streamless = gradient is None and relevance is None
    if 0 in (sizes[0], sizes[3], sizes[4]) or (targets == 0 and not streamless):
        for tensor in results.values():
            tensor.zero_()
    else:
        given = layer.tensors | results
        _C.attention_relevance(
            layer.compute.itemsize,
            (targets, *sizes, 0 if walked is None else len(walked)),
            {name: (tensor.data_ptr(), tensor.stride()[:-1]) for name, tensor in given.items()},
            {name: CODES[tensor.dtype] for name, tensor in given.items() if tensor.dtype in HALF},
            scale,
            causal,
            exact_output and output is not None,
            QK_RULES[qk],
            0 if edge is None else EDGES[edge],
            *qk_stabiliser,
            *av_stabiliser,
            torch.get_num_threads(),
        )
    gradients, relevances = _in_dtype_of(gradient, made["gradient"]), _in_dtype_of(relevance, made["relevance"])
    return AttentionStreams(gradients, relevances, walked).of_channels(q, k, v)


def _in_dtype_of(stream: Tensor | None, parts: Parts) -> Parts:
    q, k, v = (part if part is None or stream is None else part.to(stream.dtype) for part in parts)
    return q, k, v


@dataclass(frozen=True)
class Layer:
    """A call's tensors by the kernel's names, checked, on one device, with a contiguous last axis.

    Attributes:
        tensors: q, k, v and what is given of output, seen or bias (the mask), gradient, relevance and row; with one
            channel of zeros where they have none.
        sizes: B, H, Hk, Nq, Nk, d, dv of these tensors.
        targets: T of the streams, 0 without any.
        compute: what is computed in, float32 or float64.
    """

    tensors: dict[str, Tensor]
    sizes: tuple[int, ...]
    targets: int
    compute: torch.dtype


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor | None,
    mask: Tensor | None,
    gradient: Tensor | None,
    relevance: Tensor | None,
    row: Tensor | None,
    qk: str,
    edge: str | None,
) -> Layer:
    """The arguments of `attention_relevance`, held to its description on whichever device q is."""
    stream_dtype("q", q)
    if qk not in QK_RULES:
        raise OptionError(f"qk: expected one of {', '.join(QK_RULES)}, got {qk!r}")
    if edge is not None and edge not in EDGES:
        raise OptionError(f"edge: expected one of {', '.join(EDGES)}, got {edge!r}")
    if relevance is not None and output is None:
        raise OptionError("output: expected a tensor, which the relevance stream needs, got None")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, tensor, 4, "B, H, N, d")
    batch, heads, queries, width = q.shape
    key_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    check_heads(heads, key_heads)
    streams = {name: s for name, s in (("gradient", gradient), ("relevance", relevance)) if s is not None}
    compute = compute_dtype(q, gradient, relevance, row if edge is not None else None)
    found = {
        "q": _rows("q", q, (batch, heads, queries, width), q, compute),
        "k": _rows("k", k, (batch, key_heads, keys, width), q, compute),
        "v": _rows("v", v, (batch, key_heads, keys, value_width), q, compute),
    }
    if output is not None:
        found["output"] = _rows("output", output, (batch, heads, queries, value_width), q, compute)
    if mask is not None:
        name, expanded = _mask(mask, (batch, heads, queries, keys), q, compute)
        found[name] = expanded
    targets = next((s.shape[0] for s in streams.values() if s.dim()), 0)
    for name, stream in streams.items():
        _check_rank(name, stream, 5, "T, B, H, Nq, dv")
        found[name] = _rows(name, stream, (targets, batch, heads, queries, value_width), q, compute)
    found = {name: tensor if name in ("seen", "bias") else widened(tensor) for name, tensor in found.items()}
    if edge is not None:
        for name in ("gradient", "relevance"):
            if name in edge and name not in found:
                raise OptionError(f"{name}: expected a tensor, which the edge {edge!r} needs, got None")
        found["row"] = _row(edge, row, targets, (batch, queries), q, compute)
    sizes = (batch, heads, key_heads, queries, keys, found["q"].shape[3], found["v"].shape[3])
    return Layer(found, sizes, targets, compute)


def compute_dtype(q: Tensor, gradient: Tensor | None, relevance: Tensor | None, row: Tensor | None) -> torch.dtype:
    """What is computed in: float64 where the first of the streams is (q, without any), else float32."""
    for name, stream in (("gradient", gradient), ("relevance", relevance), ("row", row)):
        if stream is not None:
            return stream_dtype(name, stream)
    return stream_dtype("q", q)


def check_heads(heads: int, key_heads: int) -> None:
    """Raises ShapeError where heads cannot share key heads in groups of one size."""
    if heads == 0:
        raise ShapeError("q: expected at least one head, got none")
    if key_heads == 0 or heads % key_heads:
        raise ShapeError(f"k: expected a number of heads that divides {heads}, got {key_heads}")


def _row(
    edge: str, row: Tensor | None, targets: int, shape: tuple[int, int], like: Tensor, compute: torch.dtype
) -> Tensor:
    """The row with a leading axis of as many targets as the edge has. [T, B, Nq]"""
    if row is None:
        raise OptionError(f"row: expected a tensor, which the edge {edge!r} needs, got None")
    _check_rank("row", row, 3, "T, B, Nq")
    shared = edge == "attention" or row.shape[0] == 1
    row = _rows("row", row, (row.shape[0] if shared else targets, *shape), like, compute).to(compute)
    return row if edge == "attention" else row.expand(targets, -1, -1)


def _outputs(layer: Layer, wanted: Wanted) -> Parts:
    """New tensors [T, B, H, N, width], laid out token by token as projections have their heads."""
    parts = []
    for name, want in zip("qkv", wanted, strict=True):
        batch, heads, rows, width = layer.tensors[name].shape
        shape = (layer.targets, batch, rows, heads, width)
        parts.append(empty(shape, layer.compute).transpose(2, 3) if want else None)
    return (parts[0], parts[1], parts[2])
