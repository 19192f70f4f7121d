"""Every kernel compiled ahead of time at its tabled configurations; run in a process of its own.

    python -m tests.kernels.compile_cases ARCHITECTURE,... [PATTERN] [launches|unreached]

writes one line of JSON per compiled kernel; with `launches` nothing is compiled, and each has its tiles alone; with
`unreached` the keys of the table of configurations that no case asks for. Cases are calls of the public functions on
tensors of the meta device, so that what is compiled is what would be launched.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from relprop.kernels import configurations
from relprop.kernels.activation_gradient import activation_gradient
from relprop.kernels.add_epsilon import add_epsilon
from relprop.kernels.add_gamma import add_gamma
from relprop.kernels.add_normalised import add_normalised
from relprop.kernels.ahead_of_time import compile_launch
from relprop.kernels.attention_relevance import QK_RULES, attention_relevance
from relprop.kernels.fanout_epsilon import fanout_epsilon
from relprop.kernels.launch import Launch, recording
from relprop.kernels.linear_alpha_beta import linear_alpha_beta_back, linear_alpha_beta_share_out
from relprop.kernels.linear_back_add import linear_back_add
from relprop.kernels.linear_back_gated import linear_back_gated
from relprop.kernels.linear_epsilon import linear_epsilon_back, linear_epsilon_share_out
from relprop.kernels.linear_gamma import linear_gamma_back, linear_gamma_share_out
from relprop.kernels.norm_gradient import norm_gradient
from relprop.kernels.norm_sigma_constant import norm_sigma_constant
from relprop.kernels.softmax_taylor import softmax_taylor

Case = tuple[str, Callable[[], object]]
REFERENCE = (1, 1e-9)
# bfloat16 and float16 operands, and float32 in each of its products.
PRODUCTS = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "tf32x3"),
    "ieee": (torch.float32, "ieee"),
    "medium": (torch.float32, "medium"),
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_cases() -> Iterator[Case]:
    for (name, (dtype, precision)), rows, k in itertools.product(PRODUCTS.items(), (1, 4096), (768, 770)):
        if k == 770 and name not in ("bf16", "tf32"):
            continue
        x, w, bias = empty(rows, k, dtype=dtype), empty(3072, k, dtype=dtype), empty(3072, dtype=dtype)
        r, s, y = empty(2, rows, 3072), empty(2, rows, 3072, dtype=dtype), empty(rows, 3072)
        options = {"stabiliser": REFERENCE, "precision": precision}
        size = f"{'few' if rows == 1 else 'many'}/{'even' if k == 768 else 'odd'}"

        def case(
            label: str, run: Callable[..., object], *args: object, at: str = f"{name}/{size}", **named: object
        ) -> Case:
            return f"{label}/{at}", lambda: run(*args, **named)

        yield case("linear_alpha_beta/share_out", linear_alpha_beta_share_out, r, x, w, None, bias, **options)
        yield case("linear_alpha_beta/opposed", linear_alpha_beta_share_out, r, x, w, None, bias, beta=1.0, **options)
        yield case("linear_alpha_beta/back", linear_alpha_beta_back, s, s, x, w, precision=precision)
        yield case("linear_alpha_beta/fused", linear_alpha_beta_back, s, s, x, w, s, precision=precision)
        if dtype != torch.float32:
            yield case("linear_alpha_beta/float32_fused", linear_alpha_beta_back, r, r, x, w, r, precision=precision)
        separate = empty(2, rows, 3072, dtype=dtype)
        yield case("linear_alpha_beta/separate", linear_alpha_beta_back, s, separate, x, w, s, precision=precision)
        if dtype == torch.float32:
            yield case("linear_alpha_beta/from_y", linear_alpha_beta_share_out, r, x, w, y, bias, **options)
        whole = empty(2, 1, rows, k)
        given = (x[None], w, whole, x[None], x[None], x[None])
        for label, gradients in (("add", None), ("add_fused", s[:, None])) if k % 16 == 0 else ():
            back = functools.partial(linear_back_add, s[:, None], s[:, None], *given, gradients)
            options_of = {"plain": 0.5, "magnified": 0.5, "other_scale": empty(2, 1), "gather_stabiliser": REFERENCE}
            yield case(f"linear_alpha_beta/{label}", back, **options_of, **options)
        yield case("linear_back/slope", linear_back_gated, s, w, x, x, precision=precision)
        yield case("linear_back/gated", linear_back_gated, s, w, x, x, x, activation="silu", precision=precision)
        yield case("linear_epsilon/share_out", linear_epsilon_share_out, r, x, w, None, bias, **options)
        yield case("linear_epsilon/back", linear_epsilon_back, s, x, w, s, precision=precision)
        yield case("linear_gamma/share_out", linear_gamma_share_out, r, x, w, None, bias, **options)
        yield case("linear_gamma/back", linear_gamma_back, s, separate, x, w, precision=precision)
        if rows > 1 and k == 768:
            yield from ragged_cases(name, dtype, precision)
            for targets in (1, 2):
                run = functools.partial(
                    linear_alpha_beta_share_out, r[:targets, None], x[None], w, None, bias, scale=empty(targets, 1)
                )
                yield case("linear_alpha_beta/scaled", run, at=f"{name}/{size}/{targets}", **options)


def ragged_cases(name: str, dtype: torch.dtype, precision: str) -> Iterator[Case]:
    """Way back from a number of outputs that is no whole number of tiles, as of classes."""
    for targets in (1, 2):
        x, w, s = empty(64, 768, dtype=dtype), empty(1000, 768, dtype=dtype), empty(targets, 64, 1000, dtype=dtype)
        given = (x[None], w, empty(targets, 1, 64, 768), x[None], x[None], x[None])
        options = {"plain": 0.5, "magnified": 0.5, "other_scale": empty(targets, 1), "gather_stabiliser": REFERENCE}
        streams = {"back": (s, s, None), "fused": (s, s, s), "separate": (s, empty(*s.shape, dtype=dtype), s)}
        if dtype != torch.float32:
            streams["float32_fused"] = (empty(*s.shape), empty(*s.shape), empty(*s.shape))
        for label, (p1, p2, gradients) in streams.items():
            back = functools.partial(linear_alpha_beta_back, p1, p2, x, w, gradients, precision=precision)
            yield f"linear_alpha_beta/{label}/{name}/ragged/{targets}", back
        for label, gradients in (("add", None), ("add_fused", s[:, None])):
            add = functools.partial(linear_back_add, s[:, None], s[:, None], *given, gradients, **options)
            run = functools.partial(add, stabiliser=REFERENCE, precision=precision)
            yield f"linear_alpha_beta/{label}/{name}/ragged/{targets}", run
        gated = functools.partial(linear_back_gated, s, w, x, x, x, activation="silu", precision=precision)
        yield f"linear_back/gated/{name}/ragged/{targets}", gated


def attention_case(
    at: str, q: Tensor, label: str, k: Tensor, streams: tuple[Tensor | None, Tensor | None], **options: object
) -> Case:
    return f"attention_relevance/{label}/{at}", lambda: attention_relevance(q, k, k, q, *streams, **options)


def attention_cases() -> Iterator[Case]:
    for (name, (dtype, precision)), d, qk in itertools.product(
        PRODUCTS.items(), (64, 128, 256), ("half", "alpha_beta")
    ):
        q, k, stream = empty(2, 12, 1000, d, dtype=dtype), empty(2, 4, 1000, d, dtype=dtype), empty(2, 2, 12, 1000, d)
        row = {"row": empty(2, 2, 1000), "edge": "gradient_x_relevance"}
        boolean, both = empty(2, 1, 1000, 1000, dtype=torch.bool), (stream, stream)
        case = functools.partial(attention_case, f"{name}/{qk}/d{d}", q, qk=qk, precision=precision)
        yield case("plain", q, both, **row)
        if name == "bf16":
            yield case("bias_causal", q, both, mask=empty(2, 1, 1000, 1000), causal=True, **row)
        if name in ("bf16", "fp16", "tf32x3"):
            yield case("masked_causal_grouped", k, both, mask=boolean, causal=True, **row)
        if name in ("bf16", "fp16") and qk == "half" and d == 64:
            yield case("causal", q, both, causal=True, **row)
            yield case("padding", q, both, mask=boolean[:, :, :1], **row)
            yield case("gradient", q, (stream, None))
            yield case("relevance", q, (None, stream), row=row["row"], edge="relevance")
            yield attention_case(f"{name}/none/d{d}", q, "detached", k, both, qk="none", precision=precision, **row)
        if (name, qk, d) in (("bf16", "half", 256), ("fp16", "half", 64)):
            yield case("grouped", k, both, **row)
        if d == 64 and qk == "alpha_beta":
            # Without relevance at k the key side sums no shares by their sign.
            yield case("no_relevance_at_keys", q, both, relevances_wanted=(True, False, True), **row)


def other_cases() -> Iterator[Case]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        r, x, y = empty(2, 64, 197, 768), empty(64, 197, 768, dtype=dtype), empty(64, 197, 768, dtype=dtype)
        for deferred in (False, True):
            run = functools.partial(add_normalised, r, x, y, stabiliser=REFERENCE, deferred=deferred)
            yield f"add_normalised/few/{name}/{deferred}", run
        yield f"add_epsilon/few/{name}", functools.partial(add_epsilon, r, x, y, stabiliser=REFERENCE)
        yield f"add_gamma/few/{name}", functools.partial(add_gamma, r, x, y, stabiliser=REFERENCE)
        yield f"fanout_epsilon/few/{name}", functools.partial(fanout_epsilon, [r] * 5, x, stabiliser=REFERENCE)
        yield f"softmax_taylor/few/{name}", functools.partial(softmax_taylor, r, x, y)
        long = empty(2, 8, 197, 4096), *(empty(8, 197, 4096, dtype=dtype) for _ in range(2))
        yield f"softmax_taylor/few/{name}/4096", functools.partial(softmax_taylor, *long)
        for activation in ("gelu", "gelu_tanh", "silu"):
            yield f"activation/few/{name}/{activation}", functools.partial(activation_gradient, r, x, activation)
        for kind, n in itertools.product(("layer", "rms"), (768, 4096, 8000)):
            r, x, weight = empty(2, 128, n), empty(128, n, dtype=dtype), empty(n, dtype=dtype)
            yield f"norm_gradient/few/{name}/{kind}/{n}", functools.partial(norm_gradient, r, x, weight, kind=kind)
            run = functools.partial(norm_sigma_constant, r, x, x, weight, kind=kind, stabiliser=REFERENCE)
            yield f"norm_sigma_constant/few/{name}/{kind}/{n}", run


def cases() -> Iterator[Case]:
    """All of them, by name."""
    yield from linear_cases()
    yield from attention_cases()
    yield from other_cases()


def signed_shares(launch: Launch) -> bool:
    """Whether an attention kernel sums the positive and the negative part of z+ shares, each by itself."""
    given = launch.constants
    return given.get("QK") == QK_RULES["alpha_beta"] and bool(given.get("RELEVANCE") or given.get("KEY_RELEVANCE"))


class Watched(dict[tuple[str, str, str], configurations.Rows]):
    """A table that knows what was asked for."""

    def __init__(self, table: dict[tuple[str, str, str], configurations.Rows]) -> None:
        super().__init__(table)
        self.asked: set[tuple[str, str, str]] = set()

    def __getitem__(self, key: tuple[str, str, str]) -> configurations.Rows:
        self.asked.add(key)
        return super().__getitem__(key)


def described(launch: Launch, name: str, architecture: int) -> dict[str, Any]:
    """What a launch is compiled with."""
    chosen = launch.configuration
    return {
        "case": name,
        "kernel": launch.kernel.__name__,
        "architecture": architecture,
        "tiles": dict(chosen.tiles),
        "warps": chosen.warps,
        "stages": chosen.stages,
    }


def main(architectures: str, pattern: str = "*", what: str = "compiled") -> None:
    """Compile what matches on each architecture, or say what would be."""
    warnings.simplefilter("ignore")
    table = configurations.TABLE = Watched(configurations.TABLE)
    for architecture, (name, run) in itertools.product([int(a) for a in architectures.split(",")], cases()):
        if not fnmatch(name, pattern):
            continue
        with recording(architecture) as launches:
            run()
        for launch in launches:
            row = described(launch, name, architecture)
            if what == "compiled":
                built = compile_launch(launch, architecture)
                row |= {
                    "registers": built.registers,
                    "stack": built.stack,
                    "shared": built.shared,
                    "wgmma": "wgmma.mma_async" in built.ptx,
                    "tcgen05": "tcgen05.mma" in built.ptx,
                    "signed": signed_shares(launch),
                }
            if what != "unreached":
                print(json.dumps(row), flush=True)
    if what == "unreached":
        print(json.dumps(sorted(set(table) - table.asked)))


if __name__ == "__main__":
    main(*sys.argv[1:])
