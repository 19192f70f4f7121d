"""What each custom op computes, in plain PyTorch: for devices without a kernel, and for builds without the C++ ones.

Signatures are those of the ops; shapes, dtypes and devices are checked as the kernels check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native.norm import ACTIVATIONS, NORMS, code_of
from relprop.native.tensors import HALF, TOLERANCE, stream_dtype, text_of
from relprop.rules.stabiliser import Stabiliser


def stabiliser_of(kind: int, epsilon: float) -> Stabiliser:
    """The rules' stabiliser from the kernels' code."""
    if kind not in (0, 1):
        raise OptionError(f"stabiliser_kind: expected 0 (signed) or 1 (reference), got {kind}")
    if not 0.0 <= epsilon < float("inf"):
        raise OptionError(f"epsilon: expected a finite number >= 0, got {epsilon}")
    return Stabiliser(epsilon, "reference" if kind == 1 else "signed")


class Stream:
    """A stream that sets what is computed in and on which device; the other tensors are held against it."""

    def __init__(self, name: str, tensor: Tensor, trailing: Sequence[int]) -> None:
        self.dtype = stream_dtype(name, tensor)
        self.given = tensor
        if tensor.dim() == 0:
            raise ShapeError(f"{name}: expected shape [T, ...], got []")
        self.full = (tensor.shape[0], *trailing)
        if tensor.shape != self.full:
            raise ShapeError(f"{name}: expected shape {text_of(self.full)}, got {text_of(tensor.shape)}")
        self.tensor = tensor.to(self.dtype).contiguous()

    def take(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Another tensor in the dtype of the computation."""
        if tensor.dtype not in (self.dtype, *HALF):
            allowed = f"{self.dtype}, {HALF[0]} or {HALF[1]}"
            raise DTypeError(f"{name}: expected {allowed}, got {tensor.dtype}")
        if tensor.shape != tuple(shape):
            raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
        if tensor.device != self.given.device:
            raise DeviceError(f"{name}: expected a tensor on {self.given.device}, got one on {tensor.device}")
        return tensor.to(self.dtype).contiguous()

    def give(self, result: Tensor) -> Tensor:
        """A result in the stream's dtype, contiguous and new."""
        return result.to(self.given.dtype).contiguous()


def linear_alpha_beta_share_out(
    relevance: Tensor,  # [T, ..., N]
    y: Tensor,  # [..., N]
    bias: Tensor | None,  # [N]
    absz: Tensor,  # [..., N]
    alpha: float,
    beta: float,
    tolerance: float | None,
    stabiliser_kind: int,
    epsilon: float,
) -> list[Tensor]:
    """p1, and p2 where beta is not 0; see `relprop.native.share_out`. Each [T, ..., N]"""
    stream, share = Stream("relevance", relevance, y.shape), stabiliser_of(stabiliser_kind, epsilon).share
    product, absolute = stream.take("y", y, y.shape), stream.take("absz", absz, y.shape)
    if bias is not None:
        product = product - stream.take("bias", bias, y.shape[-1:])
    noise = (TOLERANCE[stream.dtype] if tolerance is None else tolerance) * absolute
    plus, minus = (absolute + product) / 2, (product - absolute) / 2
    first = alpha * torch.where(plus <= noise, 0.0, share(stream.tensor, plus))
    if beta == 0:
        return [stream.give(first)]
    second = beta * torch.where(-minus <= noise, 0.0, share(stream.tensor, minus))
    return [stream.give(first - second), stream.give(first + second)]


def linear_alpha_beta_select(
    x: Tensor,  # [..., K]
    c1: Tensor,  # [T, ..., K]
    c2: Tensor,  # [T, ..., K]
) -> Tensor:
    """½(x ⊙ c1 + |x| ⊙ c2). [T, ..., K]"""
    stream = Stream("c1", c1, x.shape)
    x, c2 = stream.take("x", x, x.shape), stream.take("c2", c2, c1.shape)
    return stream.give((x * stream.tensor + x.abs() * c2) / 2)


def linear_epsilon_share_out(
    relevance: Tensor,  # [T, ..., N]
    y: Tensor,  # [..., N]
    bias: Tensor | None,  # [N]
    bias_factor: float,
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """R / stab(y + bias_factor · b). [T, ..., N]"""
    stream, z = Stream("relevance", relevance, y.shape), y
    z = stream.take("y", y, y.shape)
    if bias is not None:
        z = z + bias_factor * stream.take("bias", bias, y.shape[-1:])
    return stream.give(stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor, z))


def linear_epsilon_select(
    x: Tensor,  # [..., K]
    c: Tensor,  # [T, ..., K]
) -> Tensor:
    """x ⊙ c. [T, ..., K]"""
    stream = Stream("c", c, x.shape)
    return stream.give(stream.take("x", x, x.shape) * stream.tensor)


def linear_gamma_share_out(
    relevance: Tensor,  # [T, ..., N]
    y: Tensor,  # [..., N]
    bias: Tensor | None,  # [N]
    absz: Tensor,  # [..., N]
    gamma: float,
    biased: bool,
    bias_share: bool,
    stabiliser_kind: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """p1 = (2 + γ) s, p2 = γ s sign; see `relprop.native.gamma_share_out`. Each [T, ..., N]"""
    stream = Stream("relevance", relevance, y.shape)
    product, absolute = stream.take("y", y, y.shape), stream.take("absz", absz, y.shape)
    b = torch.zeros_like(product) if bias is None else stream.take("bias", bias, y.shape[-1:]).expand_as(product)
    product = product - b if biased else product
    sign = torch.sign(product + b)
    z = product + gamma / 2 * (product + sign * absolute)
    if bias_share:
        z = z + b + gamma * torch.where(sign > 0, b.clamp(min=0), b.clamp(max=0))
    s = stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor * sign.abs(), z)
    return stream.give((2 + gamma) * s), stream.give(gamma * s * sign)


def _summands(stream: Stream, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shared = b.shape != a.shape and b.shape == (1, *a.shape[1:])
    return stream.take("a", a, a.shape), stream.take("b", b, b.shape if shared else a.shape).expand(a.shape)


def add_normalised(
    relevance: Tensor,  # [T, B, ...]
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...] or [1, ...]
    stabiliser_kind: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """R_a, R_b of the normalised rule; see `relprop.native.add_normalised`. Each [T, B, ...]"""
    stream, share = Stream("relevance", relevance, a.shape), stabiliser_of(stabiliser_kind, epsilon).share
    first, second = _summands(stream, a, b)
    s = share(stream.tensor, first + second)
    parts = [first * s, second * s]
    axes = tuple(range(2, relevance.dim()))

    def total(tensor: Tensor) -> Tensor:
        return tensor.double().sum(axes, keepdim=True) if axes else tensor.double()

    sums = [total(part) for part in parts]
    size = sums[0].abs() + sums[1].abs()
    arrived = total(stream.tensor)
    factors = [share(share(one.abs(), size) * arrived, one).to(stream.dtype) for one in sums]
    return stream.give(parts[0] * factors[0]), stream.give(parts[1] * factors[1])


def add_epsilon(
    relevance: Tensor,  # [T, B, ...]
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...] or [1, ...]
    stabiliser_kind: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """R_a = aR/stab(a+b), R_b likewise. Each [T, B, ...]"""
    stream = Stream("relevance", relevance, a.shape)
    first, second = _summands(stream, a, b)
    s = stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor, first + second)
    return stream.give(first * s), stream.give(second * s)


def add_gamma(
    relevance: Tensor,  # [T, B, ...]
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...] or [1, ...]
    gamma: float,
    stabiliser_kind: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The gamma rule of an add; see `relprop.native.add_gamma`. Each [T, B, ...]"""
    stream = Stream("relevance", relevance, a.shape)
    first, second = _summands(stream, a, b)
    total = first + second
    parts = [torch.where(part * total > 0, (1 + gamma) * part, part) for part in (first, second)]
    s = stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor, parts[0] + parts[1])
    half = stream.tensor / 2
    return (
        stream.give(torch.where(total == 0, half, parts[0] * s)),
        stream.give(torch.where(total == 0, half, parts[1] * s)),
    )


def fanout_epsilon(
    relevances: Sequence[Tensor],  # each [T, ...]
    x: Tensor,  # [...]
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """x ⊙ Σᵢ rᵢ / stab(x). [T, ...]"""
    if not relevances:
        raise OptionError("relevances: expected at least one tensor, got none")
    stream, share = Stream("relevances[0]", relevances[0], x.shape), stabiliser_of(stabiliser_kind, epsilon).share
    x = stream.take("x", x, x.shape)
    total = share(stream.tensor, x)
    for i, relevance in enumerate(relevances[1:]):
        total = total + share(stream.take(f"relevances[{i + 1}]", relevance, stream.full), x)
    return stream.give(x * total)


def matmul_half_share(
    relevance: Tensor,  # [T, ...]
    z: Tensor,  # [...]
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """R / stab(z). [T, ...]"""
    stream = Stream("relevance", relevance, z.shape)
    return stream.give(stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor, stream.take("z", z, z.shape)))


def matmul_half_attention_shares(
    attention: Tensor,  # [B, H, Nq, Nk]
    sv: Tensor,  # [T, B, H, Nq, Nk]
    dots: Tensor,  # [B, H, Nq, Nk]
    stabiliser_kind: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """s' = R_A / stab(q kᵀ) and R_A = ½ A ⊙ (s vᵀ). Each [T, B, H, Nq, Nk]"""
    stream = Stream("sv", sv, attention.shape)
    half = stream.take("attention", attention, attention.shape) / 2 * stream.tensor
    dots = stream.take("dots", dots, attention.shape)
    return stream.give(stabiliser_of(stabiliser_kind, epsilon).share(half, dots)), stream.give(half)


def matmul_half_rollout_matrix(
    grad: Tensor,  # [T, B, H, Nq, Nk]
    relevance: Tensor,  # [T, B, H, Nq, Nk]
) -> Tensor:
    """Mean over heads of (∇A ⊙ R_A)⁺. [T, B, Nq, Nk]"""
    if grad.dim() != 5 or grad.shape[2] == 0:
        raise ShapeError(f"grad: expected shape [T, B, H, Nq, Nk] with at least one head, got {text_of(grad.shape)}")
    stream = Stream("grad", grad, grad.shape[1:])
    return stream.give((stream.tensor * stream.take("relevance", relevance, grad.shape)).clamp(min=0).mean(2))


def softmax_taylor(
    relevance: Tensor,  # [T, ..., N]
    logits: Tensor,  # [..., N]
    probabilities: Tensor,  # [..., N]
) -> Tensor:
    """x ⊙ (R - p ΣR), infinite logits as 0. [T, ..., N]"""
    stream = Stream("relevance", relevance, logits.shape)
    x, p = stream.take("logits", logits, logits.shape), stream.take("probabilities", probabilities, logits.shape)
    total = stream.tensor.double().sum(-1, keepdim=True).to(stream.dtype)
    return stream.give(torch.where(x.isfinite(), x, 0.0) * (stream.tensor - p * total))


def activation_gradient(
    gradient: Tensor,  # [T, ...]
    x: Tensor,  # [...]
    activation: str,
) -> Tensor:
    """g ⊙ f'(x). [T, ...]"""
    stream = Stream("gradient", gradient, x.shape)
    code_of("activation", activation, ACTIVATIONS)
    x, ones = stream.take("x", x, x.shape), torch.ones_like(x, dtype=stream.dtype)
    if activation == "silu":
        slope = torch.ops.aten.silu_backward(ones, x)
    else:
        slope = torch.ops.aten.gelu_backward(ones, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return stream.give(stream.tensor * slope)


def activation_slope(
    relevance: Tensor,  # [T, ...]
    x: Tensor,  # [...]
    y: Tensor,  # [...]
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """x ⊙ (y/stab(x)) ⊙ (R/stab(y)). [T, ...]"""
    stream, share = Stream("relevance", relevance, x.shape), stabiliser_of(stabiliser_kind, epsilon).share
    x, y = stream.take("x", x, x.shape), stream.take("y", y, x.shape)
    return stream.give(x * share(y, x) * share(stream.tensor, y))


def _inverse(x: Tensor, norm: str, epsilon: float) -> tuple[Tensor, Tensor]:
    """x less its mean (RMS norm: x), and 1/σ. [..., N], [..., 1]"""
    code_of("norm", norm, NORMS)
    if not 0.0 <= epsilon < float("inf"):
        raise OptionError(f"epsilon: expected a finite number >= 0, got {epsilon}")
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return centred, torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)


def norm_gradient(
    gradient: Tensor,  # [T, ..., N]
    x: Tensor,  # [..., N]
    weight: Tensor | None,  # [N]
    norm: str,
    norm_epsilon: float,
) -> Tensor:
    """Gradient of a layer norm or RMS norm over the last axis. [T, ..., N]"""
    stream = Stream("gradient", gradient, x.shape)
    centred, inverse = _inverse(stream.take("x", x, x.shape), norm, norm_epsilon)
    h = stream.tensor if weight is None else stream.tensor * stream.take("weight", weight, x.shape[-1:])
    u = centred * inverse
    mean = h.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return stream.give(inverse * (h - mean - u * (h * u).mean(-1, keepdim=True)))


def norm_sigma_constant(
    relevance: Tensor,  # [T, ..., N]
    x: Tensor,  # [..., N]
    y: Tensor,  # [..., N]
    weight: Tensor | None,  # [N]
    norm: str,
    norm_epsilon: float,
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """x ⊙ (h - mean(h)) / σ, h = R weight / stab(y); an RMS norm without the mean. [T, ..., N]"""
    stream = Stream("relevance", relevance, x.shape)
    x, y = stream.take("x", x, x.shape), stream.take("y", y, x.shape)
    _, inverse = _inverse(x, norm, norm_epsilon)
    h = stabiliser_of(stabiliser_kind, epsilon).share(stream.tensor, y)
    h = h if weight is None else h * stream.take("weight", weight, x.shape[-1:])
    return stream.give(x * inverse * (h - h.mean(-1, keepdim=True) if norm == "layer" else h))


class Product:
    """What a linear layer's own products take: a weight, streams in float32, other tensors in float32 or half."""

    def __init__(self, weight: Tensor, operands: torch.dtype) -> None:
        if operands not in (torch.float32, torch.bfloat16):
            raise OptionError(f"operands: expected torch.float32 or torch.bfloat16, got {operands}")
        if weight.dim() != 2:
            raise ShapeError(f"weight: expected shape [N, K], got {text_of(weight.shape)}")
        self.operands, self.device = operands, weight.device
        self.n, self.k = weight.shape
        self.weight = self.multiplied("weight", weight, weight.shape)

    def multiplied(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A factor as it is multiplied, in float32."""
        return self._checked(name, tensor, shape, (torch.float32, *HALF)).to(self.operands).float()

    def stream(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A stream, or y or the bias: float32."""
        return self._checked(name, tensor, shape, (torch.float32,))

    def _checked(self, name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
        if tensor.dtype not in dtypes:
            raise DTypeError(f"{name}: expected {', '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
        if tensor.shape != tuple(shape):
            raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
        if tensor.device != self.device:
            raise DeviceError(f"{name}: expected a tensor on {self.device}, got one on {tensor.device}")
        return tensor


def linear_apply(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    operands: torch.dtype,
) -> Tensor:
    """x wᵀ + b in float32. [..., N]"""
    product = Product(weight, operands)
    y = product.multiplied("x", x, (*x.shape[:-1], product.k)) @ product.weight.mT
    return y if bias is None else y + product.stream("bias", bias, (product.n,))


def linear_apply_rounded(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    operands: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x wᵀ + b rounded to bfloat16, and x wᵀ in float32. Each [..., N]"""
    sums = linear_apply(x, weight, None, operands)
    y = sums if bias is None else sums + Product(weight, operands).stream("bias", bias, (weight.shape[0],))
    return y.bfloat16(), sums


def linear_transpose(
    stream: Tensor,  # [T, ..., N]
    weight: Tensor,  # [N, K]
    operands: torch.dtype,
) -> Tensor:
    """stream w. [T, ..., K]"""
    product = Product(weight, operands)
    stream = product.stream("stream", stream, (*stream.shape[:-1], product.n))
    return stream.to(operands).float() @ product.weight


def linear_alpha_beta_share_out_product(
    relevance: Tensor,  # [T, ..., N]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    y: Tensor | None,  # [..., N]
    bias: Tensor | None,  # [N]
    operands: torch.dtype,
    alpha: float,
    tolerance: float,
    stabiliser_kind: int,
    epsilon: float,
) -> Tensor:
    """αR / stab(z⁺), z⁺ = ½(x wᵀ + |x||w|ᵀ). [T, ..., N]"""
    product = Product(weight, operands)
    factor, shape = product.multiplied("x", x, (*x.shape[:-1], product.k)), (*x.shape[:-1], product.n)
    product.stream("relevance", relevance, (*relevance.shape[:1], *shape))
    if y is None:
        y, bias = factor @ product.weight.mT, None
    y, bias = product.stream("y", y, shape), None if bias is None else product.stream("bias", bias, (product.n,))
    given = (alpha, 0.0, tolerance, stabiliser_kind, epsilon)
    return linear_alpha_beta_share_out(relevance, y, bias, factor.abs() @ product.weight.abs().mT, *given)[0]


def linear_alpha_beta_back_product(
    shares: Tensor,  # [T, ..., N]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    operands: torch.dtype,
) -> Tensor:
    """½(x ⊙ (s w) + |x| ⊙ (s |w|)). [T, ..., K]"""
    product = Product(weight, operands)
    product.multiplied("x", x, (*x.shape[:-1], product.k))
    s = product.stream("shares", shares, (*shares.shape[:1], *x.shape[:-1], product.n)).to(operands).float()
    return linear_alpha_beta_select(x, s @ product.weight, s @ product.weight.abs())
