"""Attention layers in tiles: gradient and relevance through softmax(scale q k^T + mask) v, without a map of N x N.

    A = exp(scale q k^T + mask - lse)      s = R_O / stab(O)           R_A = A (s v^T) / 2      R_v = v (A^T s) / 2
    s' = R_A / stab(q k^T)                 R_q = q (s' k) / 2          R_k = k (s'^T q) / 2
    dA = g v^T      dS = A (dA - g O)      dq = scale dS k             dk = scale dS^T q        dv = A^T g
    row' = sum_i row_i mean_h E_hij        E = (dA R_A)+, (dA A)+, (R_A)+ or A

Three kernels (`attention_tiles`): statistics and shares per query; the query side; the key side, which also sums the
read-out row. Sums run inside a program, so nothing depends on the order in which programs end.

Source: Chefer et al., CVPR 2021, section 3; AttnLRP (Achtibat et al., ICML 2024), section 3.3; Dao et al., NeurIPS 2022
(tiles and the gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.kernels.attention_tiles import (
    _attention_relevance_keys_kernel,
    _attention_relevance_queries_kernel,
    _attention_relevance_statistics_kernel,
)
from relprop.kernels.checks import Stabiliser, check, check_dtype, check_stabiliser, text, with_unit_stride
from relprop.kernels.configurations import configuration, tabled_architecture
from relprop.kernels.launch import (
    Configuration,
    architecture_of,
    cdiv,
    interpreted,
    launch,
    next_power_of_two,
    products,
    share_products,
    tl_dtype,
)

QK_RULES = {"half": 0, "alpha_beta": 1, "none": 2}
EDGES = {None: 0, "gradient_x_relevance": 1, "gradient_x_attention": 2, "relevance": 3, "attention": 4}
_LARGEST_HEAD = 256
Parts = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted = tuple[bool, bool, bool]


@dataclass
class AttentionStreams:
    """What passed an attention layer.

    Attributes:
        gradients: at q, k and v, None for what was not wanted. [T, B, H, Nq, d], [T, B, Hk, Nk, d], [T, B, Hk, Nk, dv]
        relevances: likewise.
        row: the read-out row times the layer's matrix E. [T, B, Nk]
    """

    gradients: Parts = (None, None, None)
    relevances: Parts = (None, None, None)
    row: Tensor | None = None


def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    gradient: Tensor | None = None,
    relevance: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    qk: str = "half",
    qk_stabiliser: Stabiliser = (0, 1e-9),
    av_stabiliser: Stabiliser = (0, 1e-9),
    row: Tensor | None = None,
    edge: str | None = None,
    gradients_wanted: Wanted = (True, True, True),
    relevances_wanted: Wanted = (True, True, True),
    precision: str = "highest",
) -> AttentionStreams:
    """Gradient and relevance through an attention layer and one step of the row walk.

    Args:
        q: queries. [B, H, Nq, d], float32 | bfloat16 | float16; d at most 256
        k, v: keys and values; H is a multiple of Hk. [B, Hk, Nk, d], [B, Hk, Nk, dv]
        output: O as the model computed it. [B, H, Nq, dv]
        gradient: at the output, None for no gradient stream. [T, B, H, Nq, dv], float32 | bfloat16 | float16
        relevance: R_O, None for no relevance stream. [T, B, H, Nq, dv]
        mask: True where a query sees a key, or added to the logits; broadcast to [B, H, Nq, Nk]
        causal: a query sees the keys up to its own position
        scale: of q kᵀ; 1/√d unless given
        qk: rule of the product of queries and keys: "half", "alpha_beta" (z⁺ shares) or "none" (v gets everything)
        qk_stabiliser, av_stabiliser: (kind, epsilon) of the two products
        row: read-out row over the queries. [T or 1, B, Nq]
        edge: E of the read-out: "gradient_x_relevance", "gradient_x_attention", "relevance" or "attention"
        gradients_wanted, relevances_wanted: whether a stream is passed to q, k, v
        precision: of products, see `launch.products`
    Returns:
        streams in the dtype of what came in, the row in float32
    Conservation:
        sum(R_q) + sum(R_k) + sum(R_v) = sum(R_O) - epsilon leaks, per sample
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, section 3.3.
    """
    wanted = (gradients_wanted, relevances_wanted)
    call = _Attention(q, k, v, output, gradient, relevance, mask, causal, scale, qk, row, edge, wanted, precision)
    for stabiliser in (qk_stabiliser, av_stabiliser):
        check_stabiliser(stabiliser)
    call.statistics(av_stabiliser)
    queries = call.queries(qk_stabiliser)
    keys, values, reached = call.keys(qk_stabiliser)
    gradients, relevances = (
        (queries[i], keys[i], values[i]) if stream is not None else (None, None, None)
        for i, stream in enumerate((gradient, relevance))
    )
    return AttentionStreams(gradients, relevances, reached)


Pair = tuple[Tensor | None, Tensor | None]  # gradient, relevance


def _signed_parts(x: Tensor) -> Tensor:
    """x+ and x- as operands of products: large products read theirs from memory, what is computed is in registers.

    [B, H, N, d] -> [2, B, H, N, d]
    """
    parts = torch.empty((2, *x.shape), dtype=x.dtype, device=x.device)
    torch.clamp(x, min=0, out=parts[0])
    torch.clamp(x, max=0, out=parts[1])
    return parts


class _Attention:
    """One layer: its tensors checked, and the launches of its kernels in order."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        gradient: Tensor | None,
        relevance: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        qk: str,
        row: Tensor | None,
        edge: str | None,
        wanted: tuple[Wanted, Wanted],
        precision: str,
    ) -> None:
        self._check_layer(q, k, v, output)
        self._check_options(qk, edge, row, gradient, relevance)
        streams = [t for t in (gradient, relevance) if t is not None]
        self.targets = streams[0].shape[0] if streams and streams[0].dim() else 1
        for name, stream in (("gradient", gradient), ("relevance", relevance)):
            if stream is not None:
                check(name, stream, (self.targets, *output.shape), q)
        if row is not None:
            if row.dim() != 3 or row.shape[0] not in (1, self.targets):
                raise ShapeError(f"row: expected shape [{self.targets} or 1, B, Nq], got {text(row.shape)}")
            check("row", row, (row.shape[0], q.shape[0], q.shape[2]), q)
            if not streams:
                self.targets = row.shape[0]
            row = row.expand(self.targets, *row.shape[1:])
        self.q, self.k, self.v, self.o = (with_unit_stride(t) for t in (q, k, v, output))
        self.g = None if gradient is None else with_unit_stride(gradient)
        self.r = None if relevance is None else with_unit_stride(relevance)
        self.row, self.wanted, self.causal = row, wanted, causal
        self.qk, self.edge = QK_RULES[qk], EDGES[edge]
        self.batch, self.heads, self.nq, self.d = q.shape
        self.key_heads, self.nk, self.dv = k.shape[1], k.shape[2], v.shape[3]
        self.scale = self.d**-0.5 if scale is None else float(scale)
        self.mask, self.mask_kind = self._mask(mask)
        signed, largest = self.qk == QK_RULES["alpha_beta"], max(self.d, self.dv)
        self.dots = products(q.dtype, precision)
        if self.dots.kind == "medium":
            # Rounded once, and half of what every tile loads.
            self.q, self.k, self.v = (t.to(self.dots.operand) for t in (self.q, self.k, self.v))
            self.dots = products(self.dots.operand, precision)
        self.streams = share_products(self.dots)
        self.parts = [_signed_parts(t) if signed and relevance is not None else t for t in (self.q, self.k)]
        # float32 operands, and the largest heads, leave registers for one accumulator.
        self.separate = largest > (128 if self.dots.kind == "half" and not signed else 64)
        # Channels at a time in products over a head; 0 takes all, which is what large instructions want, where it fits.
        split = self.streams.operand == torch.float32 and (self.streams.precision != "tf32" or largest > 128)
        self.chunk = 32 if split else 0
        self.blocks = {
            "BLOCK_D": max(16, next_power_of_two(self.d)),
            "BLOCK_DV": max(16, next_power_of_two(self.dv)),
        }

    @staticmethod
    def _check_layer(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> None:
        check_dtype("q", q)
        if any(t.dim() != 4 for t in (q, k, v)) or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            shapes = ", ".join(text(t.shape) for t in (q, k, v))
            raise ShapeError(f"q, k, v: expected shapes [B, H, Nq, d], [B, Hk, Nk, d], [B, Hk, Nk, dv], got {shapes}")
        if not 0 < q.shape[3] <= _LARGEST_HEAD or not 0 < v.shape[3] <= _LARGEST_HEAD:
            raise ShapeError(
                f"q, v: expected heads of 1 to {_LARGEST_HEAD} channels, got {q.shape[3]} and {v.shape[3]}"
            )
        check("k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), q, q.dtype)
        check("v", v, (q.shape[0], k.shape[1], k.shape[2], v.shape[3]), q, q.dtype)
        check("output", output, (*q.shape[:3], v.shape[3]), q)

    @staticmethod
    def _check_options(
        qk: str, edge: str | None, row: Tensor | None, gradient: Tensor | None, relevance: Tensor | None
    ) -> None:
        if qk not in QK_RULES:
            raise OptionError(f"qk: expected one of {', '.join(QK_RULES)}, got {qk!r}")
        if edge not in EDGES or (edge is None) != (row is None):
            known = ", ".join(str(name) for name in EDGES)
            raise OptionError(f"edge: expected one of {known} and a row with it, got {edge!r}")
        for name, stream in (("gradient", gradient), ("relevance", relevance)):
            if edge is not None and name in edge and stream is None:
                raise OptionError(f"edge {edge}: expected a {name} stream, got None")

    def _mask(self, mask: Tensor | None) -> tuple[Tensor, int]:
        if mask is None:
            return self.q, 0
        if mask.device != self.q.device:
            check("mask", mask, mask.shape, self.q, mask.dtype)
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise DTypeError(f"mask: expected torch.bool or a floating-point dtype, got {mask.dtype}")
        full = (self.batch, self.heads, self.nq, self.nk)
        try:
            expanded = mask.expand(full)
        except RuntimeError:
            raise ShapeError(
                f"mask: expected a shape that broadcasts to {text(full)}, got {text(mask.shape)}"
            ) from None
        return (expanded.view(torch.uint8), 1) if mask.dtype == torch.bool else (expanded, 2)

    def _chosen(self, side: str, shares: bool = False) -> Configuration:
        size = max(*self.blocks.values(), 64)
        rule = "_signed" if self.qk == QK_RULES["alpha_beta"] and shares else ""
        kind = "fp16" if self.dots.operand == torch.float16 else self.dots.kind
        if interpreted:
            kind = "half"  # numpy takes larger tiles faster
        return configuration(f"attention_{side}{rule}", architecture_of(self.q.device), kind, f"d{size}")

    def _rule(self, shares: Tensor | None) -> int:
        """Of q k; one for all kernels without such shares, so that they are compiled once."""
        return QK_RULES["none"] if shares is None else self.qk

    def _constants(self, stabiliser: Stabiliser) -> dict[str, Any]:
        return {
            "KIND": stabiliser[0],
            "CAUSAL": self.causal,
            "MASK": self.mask_kind,
            "CHUNK": self.chunk,
            **self.dots.constants,
            **self.blocks,
        }

    def _stream_constants(self) -> dict[str, Any]:
        return {
            "STREAM": tl_dtype(self.streams.operand),
            "STREAM_PRECISION": self.streams.precision,
        }

    def _stream(self, stream: Tensor | None) -> Tensor:
        # Pointers that are not read are those of a tensor that is there.
        return self.o[None] if stream is None else stream

    def _mask_strides(self) -> tuple[int, ...]:
        return self.mask.stride() if self.mask_kind else (0, 0, 0, 0)

    def _empty(self, like: Tensor | None, heads: int, rows: int, channels: int, needed: bool) -> Tensor | None:
        if like is None or not needed:
            return None
        return torch.empty(self.targets, self.batch, heads, rows, channels, dtype=like.dtype, device=like.device)

    def statistics(self, stabiliser: Stabiliser) -> None:
        """Log-sum-exp of every query, g O and the shares s = R_O / stab(O)."""
        device = self.q.device
        shape = (self.batch, self.heads, self.nq)
        self.lse = torch.empty(shape, dtype=torch.float32, device=device)
        self.delta = torch.empty((self.targets, *shape), dtype=torch.float32, device=device)
        self.s = torch.empty((self.targets, *shape, self.dv), dtype=self.streams.operand, device=device)
        chosen = self._chosen("statistics")
        g, r = self._stream(self.g), self._stream(self.r)
        launch(
            _attention_relevance_statistics_kernel,
            (cdiv(self.nq, chosen.tiles["BLOCK_Q"]) * self.batch * self.heads,),
            (
                *(self.lse, self.delta, self.s, self.q, self.k, self.o, g, r, self.mask),
                *(self.targets, self.batch, self.heads, self.heads // self.key_heads),
                *(self.nq, self.nk, self.d, self.dv),
                *(*self.q.stride()[:3], *self.k.stride()[:3], *self.o.stride()[:3]),
                *(*g.stride()[:4], *r.stride()[:4], *self._mask_strides()),
                *(self.scale, float(stabiliser[1])),
            ),
            chosen,
            GRADIENT=self.g is not None,
            RELEVANCE=self.r is not None,
            **self._constants(stabiliser),
        )

    def queries(self, stabiliser: Stabiliser) -> Pair:
        """dq and R_q."""
        relevance = None if self.qk == QK_RULES["none"] else self.r
        dq = self._empty(self.g, self.heads, self.nq, self.d, self.wanted[0][0])
        rq = self._empty(relevance, self.heads, self.nq, self.d, self.wanted[1][0])
        if dq is None and rq is None:
            return None, None
        if self.separate and dq is not None and rq is not None:
            self._launch_queries(dq, None, stabiliser)
            self._launch_queries(None, rq, stabiliser)
        else:
            self._launch_queries(dq, rq, stabiliser)
        return dq, rq

    def _launch_queries(self, dq: Tensor | None, rq: Tensor | None, stabiliser: Stabiliser) -> None:
        chosen = self._chosen("queries", shares=rq is not None)
        g = self._stream(self.g)
        launch(
            _attention_relevance_queries_kernel,
            (cdiv(self.nq, chosen.tiles["BLOCK_Q"]) * self.batch * self.heads, self.targets),
            (
                *(self._stream(dq), self._stream(rq), self.q, self.k, self.v, *self.parts),
                *(g, self.s, self.lse, self.delta),
                *(self.mask, self.batch, self.heads, self.heads // self.key_heads),
                *(self.nq, self.nk, self.d, self.dv),
                *(*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]),
                *(*g.stride()[:4], *self._mask_strides()),
                *(self.scale, float(stabiliser[1])),
            ),
            chosen,
            QK=self._rule(rq),
            GRADIENT=dq is not None,
            RELEVANCE=rq is not None,
            **self._constants(stabiliser),
            **self._stream_constants(),
        )

    def keys(self, stabiliser: Stabiliser) -> tuple[Pair, Pair, Tensor | None]:
        """dk, R_k; dv, R_v; the row."""
        relevance = None if self.qk == QK_RULES["none"] else self.r
        keys = (
            self._empty(self.g, self.key_heads, self.nk, self.d, self.wanted[0][1]),
            self._empty(relevance, self.key_heads, self.nk, self.d, self.wanted[1][1]),
        )
        values = (
            self._empty(self.g, self.key_heads, self.nk, self.dv, self.wanted[0][2]),
            self._empty(self.r, self.key_heads, self.nk, self.dv, self.wanted[1][2]),
        )
        reached = None
        if self.row is not None:
            shape = (self.targets, self.batch, self.key_heads, self.nk)
            reached = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        nothing: Pair = (None, None)
        # Five accumulators of a large head, or of signed shares, do not fit into registers at once.
        if max(self.blocks.values()) <= 64 and self.qk != QK_RULES["alpha_beta"] and not self.separate:
            self._launch_keys("keys_values", keys, values, reached, stabiliser)
        elif self.separate:
            self._launch_keys("keys", (keys[0], None), nothing, None, stabiliser)
            self._launch_keys("keys", (None, keys[1]), nothing, None, stabiliser)
            self._launch_keys("keys", nothing, nothing, reached, stabiliser)
            self._launch_values(values, stabiliser)
        else:
            self._launch_keys("keys", keys, nothing, reached, stabiliser)
            self._launch_values(values, stabiliser)
        return keys, values, None if reached is None else reached.sum(2)

    def _launch_values(self, values: Pair, stabiliser: Stabiliser) -> None:
        architecture = tabled_architecture(architecture_of(self.q.device))
        # Both sums of a large head would fill the memory of this architecture's matrix units.
        apart = architecture == 100 and self.streams.kind == "half" and max(self.d, self.dv) > 128
        for pair in ((values[0], None), (None, values[1])) if apart else (values,):
            self._launch_keys("values", (None, None), pair, None, stabiliser)

    def _launch_keys(
        self,
        side: str,
        keys: Pair,
        values: Pair,
        reached: Tensor | None,
        stabiliser: Stabiliser,
    ) -> None:
        if reached is None and all(t is None for t in (*keys, *values)):
            return
        chosen = self._chosen(side, shares=keys[1] is not None)
        g, row = self._stream(self.g), self.lse if self.row is None else self.row
        launch(
            _attention_relevance_keys_kernel,
            (cdiv(self.nk, chosen.tiles["BLOCK_K"]) * self.batch * self.key_heads, self.targets),
            (
                *(self._stream(t) for t in (*keys, *values)),
                self.lse if reached is None else reached,
                *(self.q, self.k, self.v, *self.parts, g, self.s, self.lse, self.delta, row, self.mask),
                *(self.batch, self.heads, self.heads // self.key_heads, self.nq, self.nk, self.d, self.dv),
                *(*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]),
                *(*g.stride()[:4], *row.stride()[:3], *self._mask_strides()),
                *(self.scale, float(stabiliser[1]), 1.0 if self.qk == QK_RULES["none"] else 0.5),
            ),
            chosen,
            GROUPED=self.heads != self.key_heads,
            QK=self._rule(keys[1]),
            EDGE=0 if reached is None else self.edge,
            KEY_GRADIENT=keys[0] is not None,
            KEY_RELEVANCE=keys[1] is not None,
            VALUE_GRADIENT=values[0] is not None,
            VALUE_RELEVANCE=values[1] is not None,
            **self._constants(stabiliser),
            **self._stream_constants(),
        )
