"""The C++ kernels of the epsilon, gamma, Taylor, slope and gradient rules against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop import native

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

from relprop import _C  # type: ignore[attr-defined]
from relprop.errors import OptionError, ShapeError

ISAS: list[str] = _C.build_info()["isas_supported"]
DTYPES = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
SIZES = [1, 63, 1023]
TARGETS = [1, 3]
STABILISERS = [(native.SIGNED, 1e-6), (native.SIGNED, 0.0), (native.REFERENCE, 1e-9)]
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def share(relevance: Tensor, z: Tensor, stabiliser: tuple[int, float]) -> Tensor:
    kind, epsilon = stabiliser
    if kind == native.REFERENCE:
        return torch.where(z == 0, 0.0, relevance / torch.where(z + epsilon == 0, epsilon, z + epsilon))
    if epsilon == 0:
        return torch.where(z == 0, 0.0, relevance / torch.where(z == 0, 1.0, z))
    return relevance / torch.where(z < 0, z - epsilon, z + epsilon)


def assert_near(got: Tensor | None, want: Tensor, tolerance: float) -> None:
    assert got is not None and got.shape == want.shape
    scale = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-300)
    error = ((got.double() - want).abs() / scale).max()
    assert bool(error <= tolerance), f"worst error {float(error):.3g}"


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds(
    isa: str, dtype: torch.dtype, size: int, targets: int, shared: bool, stabiliser: tuple[int, float]
) -> None:
    r = random(targets, 3, size, dtype=dtype, seed=1)
    a, b = random(3, size, dtype=dtype, seed=2), random(1 if shared else 3, size, dtype=dtype, seed=3)
    b[0, 0] = -a[0, 0]  # cancels to the bit
    total = a + b  # at the kernel's precision: cancellation is the input's
    plain = share(r.double(), total.double(), stabiliser)
    out = (poisoned(targets, 3, size, dtype=dtype), poisoned(targets, 3, size, dtype=dtype))
    got = native.add_epsilon(r, a, b, stabiliser=stabiliser, out=out)
    assert got[0] is out[0] and got[1] is out[1]
    for part, summand in zip(got, (a, b), strict=True):
        assert_near(part, summand.double() * plain, TOLERANCE[dtype])

    favoured = [torch.where(part * total > 0, 3 * part, part) for part in (a, b.expand_as(a))]
    s = share(r.double(), sum(favoured).double(), stabiliser)
    halves = torch.where(total == 0, r.double() / 2, 0.0)
    for part, summand in zip(native.add_gamma(r, a, b, gamma=2.0, stabiliser=stabiliser), favoured, strict=True):
        assert_near(part, torch.where(total == 0, halves, summand.double() * s), TOLERANCE[dtype])


def test_adds_make_what_is_wanted(isa: str) -> None:
    r, a, b = (random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(2, 3, 700), (3, 700), (3, 700)]))
    for add in (native.add_epsilon, lambda *args, **options: native.add_gamma(*args, gamma=1.0, **options)):
        both = add(r, a, b, stabiliser=(0, 1e-6))
        first, none = add(r, a, b, stabiliser=(0, 1e-6), wanted=(True, False))
        assert none is None and torch.equal(first, both[0])
        none, second = add(r.half(), a, b, stabiliser=(0, 1e-6), wanted=(False, True))
        assert none is None and second.dtype is torch.float16
        assert add(r, a, b, stabiliser=(0, 1e-6), wanted=(False, False)) == (None, None)
        relevance = r.clone()
        again = add(relevance, a, b, stabiliser=(0, 1e-6), out=(torch.empty_like(r), relevance))
        assert torch.equal(again[0], both[0]) and torch.equal(again[1], both[1])


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("factor", [None, 1.0, -1.0])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_epsilon(
    isa: str, dtype: torch.dtype, n: int, targets: int, factor: float | None, stabiliser: tuple[int, float]
) -> None:
    r, y = random(targets, 2, 3, n, dtype=dtype, seed=1), random(2, 3, n, dtype=dtype, seed=2)
    bias = None if factor is None else random(n, dtype=dtype, seed=3)
    y[0, 0, 0] = 0.0 if factor is None else -factor * bias[0]
    z = y if bias is None else y + factor * bias
    s = native.epsilon_share_out(
        r, y, bias, bias_factor=factor or 0.0, stabiliser=stabiliser, out=poisoned(*r.shape, dtype=dtype)
    )
    assert_near(s, share(r.double(), z.double(), stabiliser), TOLERANCE[dtype])
    assert torch.equal(native.epsilon_select(y, r), y * r)


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize(("with_bias", "biased", "bias_share"), [(0, 0, 0), (1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0)])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gamma(
    isa: str,
    dtype: torch.dtype,
    n: int,
    targets: int,
    with_bias: bool,
    biased: bool,
    bias_share: bool,
    stabiliser: tuple[int, float],
) -> None:
    gamma, k = 0.25, 6
    x, w = random(5, k, dtype=torch.float64, seed=1), random(n, k, dtype=torch.float64, seed=2)
    bias = random(n, dtype=dtype, seed=3) if with_bias else None
    offset = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    product = x @ w.T
    product[0, 0] = -offset[0]
    absz, y = (x.abs() @ w.abs().T).to(dtype), (product + offset if biased else product).to(dtype)
    r = random(targets, 5, n, dtype=dtype, seed=4)
    p1, p2 = native.gamma_share_out(
        r,
        y,
        bias,
        absz,
        gamma=gamma,
        biased=bool(biased),
        bias_share=bool(bias_share),
        stabiliser=stabiliser,
        out=(poisoned(*r.shape, dtype=dtype), poisoned(*r.shape, dtype=dtype)),
    )
    offset = offset.to(dtype)
    product = y - offset if biased else y  # at the kernel's precision
    sign = torch.sign(product + offset)
    z = product + gamma / 2 * (product + sign * absz)
    if bias_share:
        z = z + offset + gamma * torch.where(sign > 0, offset.clamp(min=0), offset.clamp(max=0))
    keeps = z.abs() > absz / 50  # elsewhere the order of additions shows
    s = torch.where(sign == 0, 0.0, share(r.double(), z.double(), stabiliser))
    tolerance = 50 * TOLERANCE[dtype]
    assert_near(p1 * keeps, (2 + gamma) * s * keeps, tolerance)
    assert_near(p2 * keeps, gamma * s * sign * keeps, tolerance)
    assert not p1[sign.expand_as(p1) == 0].any()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("n", [*SIZES, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_taylor(isa: str, dtype: torch.dtype, n: int, targets: int) -> None:
    x, r = random(2, 4, n, dtype=dtype, seed=1), random(targets, 2, 4, n, dtype=dtype, seed=2)
    x[0, 0, n // 2 :] = -torch.inf
    p = x.softmax(-1).nan_to_num(0.0)
    got = native.softmax_taylor(r, x, p, out=poisoned(*r.shape, dtype=dtype))
    finite = x.double().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    assert_near(got, finite * (r.double() - p.double() * r.double().sum(-1, keepdim=True)), 4 * TOLERANCE[dtype])
    assert torch.equal(native.softmax_taylor(r, x, p, out=r), got) and (got[:, 0, 0, n // 2 :] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_gradient(isa: str, dtype: torch.dtype, targets: int, activation: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-30])]).to(dtype)
    g = random(targets, len(x), dtype=dtype, seed=1)
    leaf = x.double().requires_grad_()
    slope = torch.autograd.grad(ACTIVATIONS[activation](leaf).sum(), leaf)[0]
    got = native.activation_gradient(g, x, activation=activation, out=poisoned(*g.shape, dtype=dtype))
    assert_near(got, g.double() * slope, TOLERANCE[dtype])
    for bad in (float("nan"), float("inf")):
        assert not native.activation_gradient(torch.full((1, 1), bad), torch.ones(1), activation=activation).isfinite()
        missing = native.activation_gradient(torch.ones(1, 1), torch.tensor([float("nan")]), activation=activation)
        assert missing.isnan()


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_slope(isa: str, dtype: torch.dtype, size: int, targets: int, stabiliser: tuple[int, float]) -> None:
    x, r = random(2, size, dtype=dtype, seed=1), random(targets, 2, size, dtype=dtype, seed=2)
    x[0, 0] = 0.0
    y = F.gelu(x)
    got = native.activation_slope(r, x, y, stabiliser=stabiliser, out=poisoned(*r.shape, dtype=dtype))
    want = x.double() * share(y.double(), x.double(), stabiliser) * share(r.double(), y.double(), stabiliser)
    assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("n", [5, 63, 1023])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(isa: str, dtype: torch.dtype, n: int, targets: int, weighted: bool, norm: str) -> None:
    x = random(2, 3, n, dtype=dtype, seed=1) + 3
    weight = random(n, dtype=dtype, seed=2) if weighted else None
    g, epsilon = random(targets, 2, 3, n, dtype=dtype, seed=3), 1e-5
    leaf, scale = x.double().requires_grad_(), None if weight is None else weight.double()
    if norm == "layer":
        y = F.layer_norm(leaf, (n,), scale, None, epsilon)
    else:
        y = F.rms_norm(leaf, (n,), scale, epsilon)
    want = torch.stack([torch.autograd.grad(y, leaf, one.double(), retain_graph=True)[0] for one in g])
    got = native.norm_gradient(g, x, weight, norm=norm, epsilon=epsilon, out=poisoned(*g.shape, dtype=dtype))
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11}[dtype]  # mean and slope are taken off
    assert_near(got, want, tolerance)

    stored, stabiliser = y.detach().to(dtype), (native.SIGNED, 1e-3)
    centre = leaf.detach() - (leaf.detach().mean(-1, keepdim=True) if norm == "layer" else 0)
    inverse = torch.rsqrt(centre.square().mean(-1, keepdim=True) + epsilon)
    h = share(g.double(), stored.double(), stabiliser) * (1 if scale is None else scale)
    linear = (h - h.mean(-1, keepdim=True)) * inverse if norm == "layer" else h * inverse
    got = native.norm_sigma_constant(g, x, stored, weight, norm=norm, epsilon=epsilon, stabiliser=stabiliser)
    assert_near(got, leaf.detach() * linear, tolerance)


def every_kernel(dtype: torch.dtype, rows: int, n: int, half: torch.dtype | None = None) -> dict[str, Tensor]:
    r = random(2, rows, n, dtype=dtype, seed=0)
    x, y, z = (random(rows, n, dtype=half or dtype, seed=i) for i in (1, 2, 3))
    if half is None:
        x, y, z = (t.to(torch.bfloat16).to(dtype) for t in (x, y, z))  # so that both spellings hold one number
    else:
        x, y, z = (t.to(torch.bfloat16).to(half) for t in (random(rows, n, dtype=dtype, seed=i) for i in (1, 2, 3)))
    stabiliser = (native.SIGNED, 1e-6)
    epsilon, gamma = (
        native.add_epsilon(r, x, y, stabiliser=stabiliser),
        native.add_gamma(r, x, y, gamma=1.0, stabiliser=stabiliser),
    )
    p1, p2 = native.gamma_share_out(r, x, y[0], z.abs(), gamma=0.5, biased=True, stabiliser=stabiliser)
    found = {
        **{f"add epsilon {i}": part for i, part in enumerate(epsilon)},
        **{f"add gamma {i}": part for i, part in enumerate(gamma)},
        "linear epsilon": native.epsilon_share_out(r, x, y[0], stabiliser=stabiliser),
        "select": native.epsilon_select(x, r),
        "p1": p1,
        "p2": p2,
        "taylor": native.softmax_taylor(r, x, y),
        "slope": native.activation_slope(r, x, y, stabiliser=stabiliser),
        **{f"gradient of {name}": native.activation_gradient(r, x, activation=name) for name in ACTIVATIONS},
    }
    for norm in ("layer", "rms"):
        found[norm] = native.norm_gradient(r, x, y[0], norm=norm, epsilon=1e-6)
        found[f"{norm} rule"] = native.norm_sigma_constant(
            r, x, y, z[0], norm=norm, epsilon=1e-6, stabiliser=stabiliser
        )
    assert all(part is not None for part in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(3, 63), (7, 30_011)])
def test_same_bits_for_every_thread_count_and_instruction_set(dtype: torch.dtype, rows: int, n: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _C.set_isa("baseline")
    first = every_kernel(dtype, rows, n)
    try:
        for name in ISAS:
            _C.set_isa(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for key, value in every_kernel(dtype, rows, n).items():
                    assert torch.equal(value, first[key]), f"{key} differs: {name}, {count} threads"
    finally:
        _C.set_isa("")
        torch.set_num_threads(before)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_operands_as_if_cast_before(dtype: torch.dtype, half: torch.dtype) -> None:
    want = every_kernel(dtype, 3, 1500)
    for key, value in every_kernel(dtype, 3, 1500, half).items():
        assert value.dtype is dtype and torch.equal(value, want[key]), key


@pytest.mark.parametrize("shape", [(0, 3, 63), (2, 0, 63), (2, 3, 0)])
def test_empty(isa: str, shape: tuple[int, int, int]) -> None:
    r, x = torch.empty(shape), torch.empty(shape[1:])
    weight, stabiliser = torch.empty(shape[2]), (native.SIGNED, 1e-6)
    made = [
        *native.add_epsilon(r, x, x, stabiliser=stabiliser),
        *native.add_gamma(r, x, x, gamma=1.0, stabiliser=stabiliser),
        native.epsilon_share_out(r, x, weight, stabiliser=stabiliser),
        *native.gamma_share_out(r, x, weight, x, gamma=1.0, biased=True, stabiliser=stabiliser),
        native.softmax_taylor(r, x, x),
        native.activation_gradient(r, x, activation="gelu"),
        native.activation_slope(r, x, x, stabiliser=stabiliser),
        native.norm_gradient(r, x, weight, norm="layer", epsilon=1e-6),
        native.norm_sigma_constant(r, x, x, weight, norm="rms", epsilon=1e-6, stabiliser=stabiliser),
    ]
    assert all(part is not None and part.shape == shape for part in made)


def test_errors() -> None:
    r, x = torch.ones(2, 3, 4), torch.ones(3, 4)
    with pytest.raises(OptionError) as error:
        native.activation_gradient(r, x, activation="relu")
    assert str(error.value) == "activation: expected one of gelu, gelu_tanh, silu, got 'relu'"
    with pytest.raises(OptionError) as error:
        native.norm_gradient(r, x, None, norm="group", epsilon=1e-6)
    assert str(error.value) == "norm: expected one of layer, rms, got 'group'"
    with pytest.raises(ValueError) as raised:
        native.norm_gradient(r, x, None, norm="rms", epsilon=-1.0)
    assert str(raised.value).startswith("epsilon: expected a finite number >= 0, got -1")
    with pytest.raises(ShapeError) as shape:
        native.softmax_taylor(r, x, x[:2])
    assert str(shape.value) == "probabilities: expected shape [3, 4], got [2, 4]"
    with pytest.raises(OptionError) as overlap:
        native.activation_slope(r[:1], x, x, stabiliser=(0, 1e-6), out=x[None])
    assert str(overlap.value) == "out: expected memory apart from the inputs and other results, got an overlap"
