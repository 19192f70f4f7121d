"""One example call of every custom op, and tensors that lie badly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STABILISER = (0, 1e-6)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(name: str, dtype: torch.dtype = torch.float32, half: torch.dtype | None = None) -> tuple[Any, ...]:
    """Streams [2, 3, 8] in a dtype, the other tensors in that or in a half precision."""
    other = half or dtype
    r, q = random(2, 3, 8, dtype=dtype, seed=1), random(2, 3, 8, dtype=dtype, seed=2)
    x, y, z = (random(3, 8, dtype=other, seed=i) for i in (3, 4, 5))
    bias, absz = random(8, dtype=other, seed=6), random(3, 8, dtype=other, seed=7).abs() + 4
    w, own = random(5, 8, dtype=other, seed=8), random(2, 3, 5, seed=9)
    maps = {"sv": (2, 1, 3, 2, 4), "a": (1, 3, 2, 4)}
    rule = ((True, True, True), (True, True, True), "positive", *STABILISER, *STABILISER, "gradient_x_relevance")
    return {
        "linear_alpha_beta_share_out": (r, y, bias, absz, 2.0, 1.0, None, *STABILISER),
        "linear_alpha_beta_select": (x, r, q),
        "linear_epsilon_share_out": (r, y, bias, 1.0, *STABILISER),
        "linear_epsilon_select": (x, r),
        "linear_gamma_share_out": (r, y, bias, absz, 0.25, True, True, *STABILISER),
        "linear_apply": (x, w, random(5, seed=10), torch.float32),
        "linear_apply_rounded": (x, w, random(5, seed=10), torch.bfloat16),
        "linear_transpose": (own, w, torch.float32),
        "linear_alpha_beta_share_out_product": (own, x, w, None, None, torch.float32, 1.0, 1e-6, *STABILISER),
        "linear_alpha_beta_back_product": (own, x, w, torch.float32),
        "add_normalised": (r, x.abs(), y.abs(), *STABILISER),
        "add_epsilon": (r, x, y, *STABILISER),
        "add_gamma": (r, x, y[:1], 1.0, *STABILISER),
        "fanout_epsilon": ([r, q], x, *STABILISER),
        "matmul_half_share": (r, z, *STABILISER),
        "matmul_half_attention_shares": (
            x.view(maps["a"]).softmax(-1),
            r.view(maps["sv"]),
            y.view(maps["a"]),
            *STABILISER,
        ),
        "attention_relevance": (
            *(
                random(2, heads, rows, 8, dtype=other, seed=i)
                for i, (heads, rows) in enumerate(((4, 5), (2, 6), (2, 6)))
            ),
            random(2, 4, 5, 8, dtype=other, seed=7).abs() + 1,
            random(5, 6, dtype=other, seed=8),
            *(random(3, 2, 4, 5, 8, dtype=dtype, seed=i) for i in (9, 10)),
            random(3, 2, 5, dtype=dtype, seed=11),
            *(0.3, False, False),
            *rule,
        ),
        "matmul_half_rollout_matrix": (r.view(maps["sv"]), q.view(maps["sv"])),
        "softmax_taylor": (r, x, y.softmax(-1)),
        "activation_gradient": (r, x, "gelu"),
        "activation_slope": (r, x, y, *STABILISER),
        "norm_gradient": (r, x, bias, "layer", 1e-6),
        "norm_sigma_constant": (r, x, y, bias, "rms", 1e-6, *STABILISER),
    }[name]


def results(name: str, made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, one byte off their alignment."""
    flat = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    start = 1 + (-flat.data_ptr()) % 16
    buffer = memoryview(flat.numpy())[start : start + tensor.nbytes]
    view = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % tensor.element_size() == 1
    return view
