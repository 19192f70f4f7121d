"""Every kernel as a custom op in the namespace `relprop`, from one table: schema, reference, compiled kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native.tensors import text_of
from relprop.ops import attention, on_gpu, reference


@dataclass(frozen=True)
class Spec:
    """One kernel: its arguments as a schema, the number of its results and what makes them.

    Args:
        arguments: of the schema, without those to write to.
        results: how many tensors; 0 for a list of one or two.
        reference: in plain PyTorch, on any device.
        kernel: on the CPU; its arguments as the schema has them, and `out` where results are given.
        stream: the argument whose shape and dtype the results have.
        last: the size of the results' last axis where it is another one: an argument, and one of its axes.
        dtype: of the results, or of each, where it is not the stream's.
        fake: shapes of the results where more than the stream decides them.
    """

    arguments: str
    results: int
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    stream: str = "relevance"
    last: tuple[str, int] | None = None
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    fake: Callable[..., Any] | None = None


def _share_out(relevance: Tensor, y: Any, bias: Any, absz: Any, alpha: float, beta: float, *rest: Any) -> list[Tensor]:
    tolerance, kind, epsilon = rest
    p1, p2 = native.share_out(
        relevance, y, bias, absz, alpha=alpha, beta=beta, tolerance=tolerance, stabiliser=(kind, epsilon)
    )
    return [p1] if beta == 0 else [p1, p2]


def _attention_shares(attention: Tensor, sv: Tensor, dots: Tensor, kind: int, epsilon: float) -> Any:
    return native.attention_shares(attention, sv, dots, stabiliser=(kind, epsilon), want_relevance=True)


def _share(relevance: Tensor, z: Tensor, kind: int, epsilon: float) -> Tensor:
    return native.share(relevance.contiguous(), z.contiguous(), stabiliser=(kind, epsilon))


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Any, norm: str, epsilon: float, out: Any = None) -> Tensor:
    return native.norm_gradient(gradient, x, weight, norm=norm, epsilon=epsilon, out=out)


def _norm_sigma_constant(relevance: Tensor, x: Tensor, y: Tensor, weight: Any, *rest: Any, **out: Any) -> Tensor:
    norm, norm_epsilon, kind, epsilon = rest
    return native.norm_sigma_constant(
        relevance, x, y, weight, norm=norm, epsilon=norm_epsilon, stabiliser=(kind, epsilon), **out
    )


def _gamma_share_out(relevance: Tensor, y: Any, bias: Any, absz: Any, *rest: Any, **out: Any) -> Any:
    gamma, biased, bias_share, *stabiliser = rest
    return native.gamma_share_out(
        relevance,
        y,
        bias,
        absz,
        gamma=gamma,
        biased=biased,
        bias_share=bias_share,
        stabiliser=(stabiliser[0], stabiliser[1]),
        **out,
    )


def _product(kernel: Callable[..., Any], plain: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """A matrix product by its kernel where the CPU has the instructions; `operands` is that argument's place."""

    def call(*arguments: Any) -> Any:
        if not native.products_fast(arguments[operands]):
            return plain(*arguments)
        *own, made_of = arguments[: operands + 1]
        return kernel(*own, *arguments[operands + 1 :], operands=made_of)

    return call


def _share_out_product(relevance: Tensor, x: Any, weight: Any, y: Any, bias: Any, *rest: Any, **options: Any) -> Tensor:
    alpha, tolerance, kind, epsilon = rest
    stabiliser = (kind, epsilon)
    return native.share_out_product(
        relevance, x, weight, y, bias, alpha=alpha, tolerance=tolerance, stabiliser=stabiliser, **options
    )


def _stabilised(kernel: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """A kernel whose last arguments are `names`, then the stabiliser's kind and epsilon."""

    def call(*arguments: Any, **out: Any) -> Any:
        count = len(arguments) - len(names) - 2
        options = dict(zip(names, arguments[count:], strict=False))
        return kernel(*arguments[:count], stabiliser=tuple(arguments[-2:]), **options, **out)

    return call


_STABILISER = "int stabiliser_kind, float epsilon"
_ADD = f"Tensor relevance, Tensor a, Tensor b, {_STABILISER}"
_LINEAR = "Tensor relevance, Tensor y, Tensor? bias"

SPECS: dict[str, Spec] = {
    "linear_alpha_beta_share_out": Spec(
        f"{_LINEAR}, Tensor absz, float alpha, float beta, float? tolerance, {_STABILISER}",
        0,
        reference.linear_alpha_beta_share_out,
        _share_out,
    ),
    "linear_alpha_beta_select": Spec(
        "Tensor x, Tensor c1, Tensor c2", 1, reference.linear_alpha_beta_select, native.select, "c1"
    ),
    "linear_epsilon_share_out": Spec(
        f"{_LINEAR}, float bias_factor, {_STABILISER}",
        1,
        reference.linear_epsilon_share_out,
        _stabilised(native.epsilon_share_out, "bias_factor"),
    ),
    "linear_epsilon_select": Spec("Tensor x, Tensor c", 1, reference.linear_epsilon_select, native.epsilon_select, "c"),
    "linear_gamma_share_out": Spec(
        f"{_LINEAR}, Tensor absz, float gamma, bool biased, bool bias_share, {_STABILISER}",
        2,
        reference.linear_gamma_share_out,
        _gamma_share_out,
    ),
    "linear_apply": Spec(
        "Tensor x, Tensor weight, Tensor? bias, ScalarType operands",
        1,
        reference.linear_apply,
        _product(native.linear_apply, reference.linear_apply, 3),
        "x",
        ("weight", 0),
        torch.float32,
    ),
    "linear_apply_rounded": Spec(
        "Tensor x, Tensor weight, Tensor? bias, ScalarType operands",
        2,
        reference.linear_apply_rounded,
        _product(native.linear_apply_rounded, reference.linear_apply_rounded, 3),
        "x",
        ("weight", 0),
        (torch.bfloat16, torch.float32),
    ),
    "linear_transpose": Spec(
        "Tensor stream, Tensor weight, ScalarType operands",
        1,
        reference.linear_transpose,
        _product(native.linear_transpose, reference.linear_transpose, 2),
        "stream",
        ("weight", 1),
    ),
    "linear_alpha_beta_share_out_product": Spec(
        "Tensor relevance, Tensor x, Tensor weight, Tensor? y, Tensor? bias, ScalarType operands, float alpha,"
        f" float tolerance, {_STABILISER}",
        1,
        reference.linear_alpha_beta_share_out_product,
        _product(_share_out_product, reference.linear_alpha_beta_share_out_product, 5),
    ),
    "linear_alpha_beta_back_product": Spec(
        "Tensor shares, Tensor x, Tensor weight, ScalarType operands",
        1,
        reference.linear_alpha_beta_back_product,
        _product(native.back_product, reference.linear_alpha_beta_back_product, 3),
        "shares",
        ("weight", 1),
    ),
    "add_normalised": Spec(_ADD, 2, reference.add_normalised, _stabilised(native.add_normalised)),
    "add_epsilon": Spec(_ADD, 2, reference.add_epsilon, _stabilised(native.add_epsilon)),
    "add_gamma": Spec(
        f"Tensor relevance, Tensor a, Tensor b, float gamma, {_STABILISER}",
        2,
        reference.add_gamma,
        _stabilised(native.add_gamma, "gamma"),
    ),
    "fanout_epsilon": Spec(
        f"Tensor[] relevances, Tensor x, {_STABILISER}",
        1,
        reference.fanout_epsilon,
        _stabilised(native.fanout_epsilon),
        "relevances",
    ),
    "matmul_half_share": Spec(f"Tensor relevance, Tensor z, {_STABILISER}", 1, reference.matmul_half_share, _share),
    "matmul_half_attention_shares": Spec(
        f"Tensor attention, Tensor sv, Tensor dots, {_STABILISER}",
        2,
        reference.matmul_half_attention_shares,
        _attention_shares,
        "sv",
    ),
    "attention_relevance": Spec(
        attention.ARGUMENTS,
        0,
        attention.attention_relevance,
        attention.on_cpu,
        "q",
        fake=attention.fake,
    ),
    "matmul_half_rollout_matrix": Spec(
        "Tensor grad, Tensor relevance", 1, reference.matmul_half_rollout_matrix, native.rollout_matrix, "grad"
    ),
    "softmax_taylor": Spec(
        "Tensor relevance, Tensor logits, Tensor probabilities", 1, reference.softmax_taylor, native.softmax_taylor
    ),
    "activation_gradient": Spec(
        "Tensor gradient, Tensor x, str activation",
        1,
        reference.activation_gradient,
        lambda gradient, x, activation, **out: native.activation_gradient(gradient, x, activation=activation, **out),
        "gradient",
    ),
    "activation_slope": Spec(
        f"Tensor relevance, Tensor x, Tensor y, {_STABILISER}",
        1,
        reference.activation_slope,
        _stabilised(native.activation_slope),
    ),
    "norm_gradient": Spec(
        "Tensor gradient, Tensor x, Tensor? weight, str norm, float norm_epsilon",
        1,
        reference.norm_gradient,
        _norm_gradient,
        "gradient",
    ),
    "norm_sigma_constant": Spec(
        f"Tensor relevance, Tensor x, Tensor y, Tensor? weight, str norm, float norm_epsilon, {_STABILISER}",
        1,
        reference.norm_sigma_constant,
        _norm_sigma_constant,
    ),
}

# Kernels that hold their tensors to certain dtypes: matrix products, and attention as a whole.
PRODUCTS = {
    "linear_apply",
    "linear_apply_rounded",
    "linear_transpose",
    "linear_alpha_beta_share_out_product",
    "linear_alpha_beta_back_product",
}
WHOLE_LAYERS = {*PRODUCTS, "attention_relevance"}
# Kernels without a variant that writes to given tensors: their wrapper has none, or the number of results varies.
WITHOUT_OUT = {"linear_alpha_beta_share_out", "matmul_half_share", "matmul_half_attention_shares", *WHOLE_LAYERS}


def _names(spec: Spec) -> list[str]:
    return [argument.split()[-1] for argument in spec.arguments.split(", ")]


def _fake(name: str, spec: Spec) -> Callable[..., Any]:
    """Shapes and dtypes of the results, from the arguments' alone."""
    names = _names(spec)
    position = names.index(spec.stream)

    def fake(*arguments: Any) -> Any:
        stream = arguments[position]
        if isinstance(stream, (list, tuple)):
            if not stream:
                raise OptionError(f"{spec.stream}: expected at least one tensor, got none")
            stream = stream[0]
        for argument, tensor in zip(names, arguments, strict=True):
            if isinstance(tensor, Tensor) and tensor.device != stream.device:
                raise DeviceError(f"{argument}: expected a tensor on {stream.device}, got one on {tensor.device}")
        shape = list(stream.shape)
        if name == "matmul_half_rollout_matrix":
            if len(shape) != 5:
                raise ShapeError(f"grad: expected shape [T, B, H, Nq, Nk], got {text_of(shape)}")
            del shape[2]
        if spec.last is not None:
            shape[-1] = arguments[names.index(spec.last[0])].shape[spec.last[1]]
        count = spec.results or (1 if arguments[names.index("beta")] == 0 else 2)
        dtypes = spec.dtype if isinstance(spec.dtype, tuple) else (spec.dtype or stream.dtype,) * count
        made = [stream.new_empty(shape, dtype=dtype) for dtype in dtypes]
        return made[0] if spec.results == 1 else made if spec.results == 0 else tuple(made)

    return fake


def _check(spec: Spec, arguments: tuple[Any, ...]) -> None:
    """Numbers must be finite, and tensors dense: what no kernel's own checks look at."""
    for argument, item in zip(spec.arguments.split(", "), arguments, strict=True):
        name = argument.split()[-1]
        if isinstance(item, float) and not math.isfinite(item):
            raise OptionError(f"{name}: expected a finite number{' >= 0' * ('epsilon' in name)}, got {item}")
        for tensor in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(tensor, Tensor) and (tensor.layout is not torch.strided or tensor.is_nested):
                kind = "a nested one" if tensor.is_nested else tensor.layout
                raise OptionError(f"{name}: expected a dense tensor (torch.strided), got {kind}")


def run_reference(name: str, arguments: tuple[Any, ...]) -> Any:
    """Plain PyTorch, on any device."""
    _check(SPECS[name], arguments)
    return SPECS[name].reference(*arguments)


def run_on_cpu(name: str, arguments: tuple[Any, ...]) -> Any:
    """The C++ kernel where it was built."""
    if not native.available()[0]:
        return run_reference(name, arguments)
    _check(SPECS[name], arguments)
    return SPECS[name].kernel(*arguments)


def run_on_gpu(name: str, arguments: tuple[Any, ...]) -> Any:
    """The CUDA or Triton kernel where one takes the call; see `relprop.ops.on_gpu`."""
    launch = on_gpu.launcher(name, dict(zip(_names(SPECS[name]), arguments, strict=True)))
    if launch is None:
        return run_reference(name, arguments)
    _check(SPECS[name], arguments)
    return launch(*arguments)


def _define(name: str, spec: Spec) -> Any:
    returns = {0: "Tensor[]", 1: "Tensor", 2: "(Tensor, Tensor)"}[spec.results]
    op = torch.library.custom_op(
        f"relprop::{name}",
        lambda *arguments: run_reference(name, arguments),
        mutates_args=(),
        schema=f"({spec.arguments}) -> {returns}",
    )
    op.register_kernel("cpu")(lambda *arguments: run_on_cpu(name, arguments))
    if name in on_gpu.CUDA or name in on_gpu.TRITON:
        op.register_kernel("cuda")(lambda *arguments: run_on_gpu(name, arguments))
    op.register_fake(spec.fake or _fake(name, spec))
    return op


def _define_out(name: str, spec: Spec) -> Any:
    """The variant that writes its results to the tensors after the kernel's own arguments."""
    places = ["out"] if spec.results == 1 else ["out_a", "out_b"]
    count = len(places)
    written = ", ".join(f"Tensor({chr(97 + i)}!) {place}" for i, place in enumerate(places))
    fake = spec.fake or _fake(name, spec)

    def copied(run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        out, made = arguments[-count:], run(name, arguments[:-count])
        results = (made,) if count == 1 else made
        for place, result in zip(out, results, strict=True):
            _check_place(place, result)
        for place, result in zip(out, results, strict=True):
            place.copy_(result)

    def on_cpu(*arguments: Any) -> None:
        if not native.available()[0]:
            return copied(run_reference, arguments)
        _check(spec, arguments[:-count])
        out = arguments[-count:]
        spec.kernel(*arguments[:-count], out=out[0] if count == 1 else out)

    def checked(*arguments: Any) -> None:
        made = fake(*arguments[:-count])
        for place, result in zip(arguments[-count:], (made,) if count == 1 else made, strict=True):
            _check_place(place, result)

    op = torch.library.custom_op(
        f"relprop::{name}_out",
        lambda *arguments: copied(run_reference, arguments),
        mutates_args=places,
        schema=f"({spec.arguments}, {written}) -> ()",
    )
    op.register_kernel("cpu")(on_cpu)
    if name in on_gpu.CUDA or name in on_gpu.TRITON:
        op.register_kernel("cuda")(lambda *arguments: copied(run_on_gpu, arguments))
    op.register_fake(checked)
    return op


def _check_place(place: Tensor, result: Tensor) -> None:
    """Whether a result can be written there."""
    if place.device != result.device:
        raise DeviceError(f"out: expected a tensor on {result.device}, got one on {place.device}")
    if place.shape != result.shape:
        raise ShapeError(f"out: expected shape {text_of(result.shape)}, got {text_of(place.shape)}")
    if not place.is_floating_point():
        raise DTypeError(f"out: expected {result.dtype}, got {place.dtype}")


OPS: dict[str, Any] = {}
for _name, _spec in SPECS.items():
    OPS[_name] = _define(_name, _spec)
    if _name not in WITHOUT_OUT:
        OPS[f"{_name}_out"] = _define_out(_name, _spec)
