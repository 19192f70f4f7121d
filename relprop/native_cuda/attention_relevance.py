"""Attention relevance in tiles on the GPU: both streams and the walk through one layer without maps."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native.attention import (
    EDGES,
    QK_RULES,
    AttentionStreams,
    Parts,
    Wanted,
    check_heads,
    widened,
)
from relprop.native.tensors import is_aligned
from relprop.native_cuda.call import DTYPES, PRODUCTS, Call, Stabiliser, code_of, compiled, empty, text_of

_ALL: Wanted = (True, True, True)


def largest_head(dtype: torch.dtype, device: torch.device) -> int:
    """How many channels a head may have on a device: 256, or as many as its shared memory has room for.

    Args:
        dtype: of the layer's tensors, float32 | bfloat16 | float16
    """
    return compiled().attention_relevance_largest_head(DTYPES[dtype], device.index or 0)


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
    product: str = "float32",
) -> AttentionStreams:
    """Gradient and relevance through attention, and row E; see `relprop.native.attention_relevance`.

    Args:
        q: d and dv are at most `largest_head`. [B, H, Nq, d], float32 | bfloat16 | float16
        k, v: [B, Hk, Nk, d], [B, Hk, Nk, dv], as q
        output: O. [B, H, Nq, dv], as q
        mask: True where a key is seen, or a float32 summand of the logits. broadcastable to [B, H, Nq, Nk]
        gradient, relevance: the streams at O. [T, B, H, Nq, dv], float32 | as q
        row: [T, B, Nq], float32
        product: of float32 layers: "float32" (three tf32 products of the halves of each factor) or "tfloat32";
            bfloat16 layers multiply bfloat16, float16 ones tf32, which holds float16 and what float16 cannot hold
    Returns:
        the streams at q, k and v in the streams' dtype, and the row in float32. The same bits at every run.
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    Source: Chefer et al., CVPR 2021, section 3; tiles as in FlashAttention (Dao et al., NeurIPS 2022).
    """
    first = next((s for s in (gradient, relevance) if s is not None), q)
    call = Call("q", q, "gradient" if gradient is not None else "relevance", first)
    if relevance is not None and output is None:
        raise OptionError("output: expected a tensor, which the relevance stream needs, got None")
    code = code_of("qk", qk, QK_RULES)
    if qk == "detached":
        relevances_wanted = (False, False, relevances_wanted[2])
    ready, sizes = _layer(call, q, k, v, output, mask)
    targets = next((s.shape[0] for s in (gradient, relevance) if s is not None and s.dim()), 0)
    streams = {"gradient": (gradient, gradients_wanted), "relevance": (relevance, relevances_wanted)}
    made: dict[str, Parts] = {}
    results: dict[str, Tensor] = {}
    for name, (stream, wanted) in streams.items():
        made[name] = (None, None, None)
        if stream is not None:
            shape = (targets, *q.shape[:3], v.shape[3])
            ready[name] = widened(_rows(call, name, stream, shape, call.streams))
            made[name] = _outputs(call, (ready["q"], ready["k"], ready["v"]), targets, wanted)
        results |= {f"{name}_{part}": t for part, t in zip("qkv", made[name], strict=True) if t is not None}
    walked = None
    if edge is not None:
        code_of("edge", edge, EDGES)
        for name, (stream, _) in streams.items():
            if stream is None and name in edge:
                raise OptionError(f"{name}: expected a tensor, which the edge {edge!r} needs, got None")
        ready["row"] = _row(call, edge, row, targets, (sizes[0], sizes[3]))
        walked = results["row_out"] = empty((len(ready["row"]), sizes[0], sizes[4]), torch.float32, call.device)
    streamless = gradient is None and relevance is None
    if 0 in (sizes[0], sizes[3], sizes[4]) or (targets == 0 and not streamless):
        for tensor in results.values():
            tensor.zero_()
        return AttentionStreams(made["gradient"], made["relevance"], walked).of_channels(q, k, v)
    whole = (targets, *sizes, 0 if walked is None else len(walked))
    edge_code = 0 if edge is None else EDGES[edge]
    workspace = empty((compiled().attention_relevance_workspace(whole, edge_code),), torch.float32, call.device)
    call.run(
        "attention_relevance",
        code_of("product", product, {name: PRODUCTS[name] for name in ("float32", "tfloat32")}),
        whole,
        {name: (tensor.data_ptr(), tensor.stride()[:-1]) for name, tensor in (ready | results).items()},
        scale,
        causal,
        exact_output and output is not None and output.dtype == torch.float32,
        code,
        edge_code,
        qk_stabiliser,
        av_stabiliser,
        workspace.data_ptr(),
    )
    return AttentionStreams(made["gradient"], made["relevance"], walked).of_channels(q, k, v)


def _rows(call: Call, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Checked, aligned, with a contiguous last axis; other strides stay as they are."""
    if tensor.dtype is not dtype:
        raise DTypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
    if tensor.device != call.device:
        raise DeviceError(f"{name}: expected a tensor on {call.device} as the others, got one on {tensor.device}")
    if tensor.is_neg() or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        return tensor.resolve_neg().contiguous()
    return tensor if is_aligned(tensor) else tensor.clone()


def _layer(
    call: Call, q: Tensor, k: Tensor, v: Tensor, output: Tensor | None, mask: Tensor | None
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The layer's tensors as the kernel reads them, and their sizes B, H, Hk, Nq, Nk, d, dv.

    Where heads have no channels the tensors have one of zeros.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name}: expected shape [B, H, N, d], got {text_of(tensor.shape)}")
    batch, heads, queries, width = q.shape
    key_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    check_heads(heads, key_heads)
    ready = {
        "q": _rows(call, "q", q, (batch, heads, queries, width), call.values),
        "k": _rows(call, "k", k, (batch, key_heads, keys, width), call.values),
        "v": _rows(call, "v", v, (batch, key_heads, keys, value_width), call.values),
    }
    if output is not None:
        ready["output"] = _rows(call, "output", output, (batch, heads, queries, value_width), call.values)
    ready = {name: widened(tensor) for name, tensor in ready.items()}
    if mask is not None:
        boolean = mask.dtype == torch.bool
        expanded = _mask(call, mask.view(torch.uint8) if boolean else mask, (batch, heads, queries, keys))
        ready["seen" if boolean else "bias"] = expanded
    return ready, (batch, heads, key_heads, queries, keys, ready["q"].shape[3], ready["v"].shape[3])


def _mask(call: Call, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask expanded to [B, H, Nq, Nk]."""
    if mask.dtype not in (torch.uint8, torch.float32):
        raise DTypeError(f"mask: expected torch.bool or torch.float32, got {mask.dtype}")
    if mask.dim() > 4 or any(m not in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ShapeError(f"mask: expected a shape that broadcasts to {text_of(shape)}, got {text_of(mask.shape)}")
    if mask.shape[-1:] != shape[-1:]:
        mask = mask.expand(*mask.shape[:-1], shape[-1])
    return _rows(call, "mask", mask, tuple(mask.shape), mask.dtype).expand(shape)


def _row(call: Call, edge: str, row: Tensor | None, targets: int, shape: tuple[int, int]) -> Tensor:
    """The row with a leading axis of as many targets as the edge has. [T, B, Nq]"""
    if row is None:
        raise OptionError(f"row: expected a tensor, which the edge {edge!r} needs, got None")
    if row.dim() != 3:
        raise ShapeError(f"row: expected shape [T, B, Nq], got {text_of(row.shape)}")
    shared = edge == "attention" or row.shape[0] == 1
    row = _rows(call, "row", row, (row.shape[0] if shared else targets, *shape), torch.float32)
    return row if edge == "attention" else row.expand(targets, -1, -1)


def _outputs(call: Call, like: tuple[Tensor, Tensor, Tensor], targets: int, wanted: Wanted) -> Parts:
    """New tensors [T, B, H, N, width], laid out token by token as projections have their heads."""
    parts = []
    for tensor, want in zip(like, wanted, strict=True):
        batch, heads, rows, width = tensor.shape
        parts.append(call.new((targets, batch, rows, heads, width)).transpose(2, 3) if want else None)
    return (parts[0], parts[1], parts[2])
