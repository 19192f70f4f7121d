"""CPU kernels that memory bounds, against copies of as many bytes: python -m benchmarks.rules.bench_elementwise.

Every custom op but matrix products and attention as a whole, as the engine calls its kernel, on the largest layers of
ViT-B/16: float32 streams beside saved tensors in float32 or, as a bfloat16 model has them, in bfloat16. Bytes are what
has to be read or written at least, once each; the ceiling is torch's copy that reads and writes as many, in turn with
the kernel and on as many threads. No time is written for a wrong answer: each is compared with float64 first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.numerics.rows import RESULTS, write_rows
from benchmarks.timing import in_turn
from relprop import native
from relprop.ops.registry import SPECS, run_reference

STABILISER = (native.SIGNED, 1e-6)
DTYPES = (torch.float32, torch.bfloat16)
NORMS = ("layer", "rms")
Arguments = tuple[Any, ...]


def cases(saved: torch.dtype, batch: int, tokens: int, channels: int, heads: int) -> dict[tuple[str, str], Arguments]:
    """Arguments by op and variant; all are positive, so that no sum cancels.

    Args:
        saved: dtype of what the forward pass left.
    """

    def made(*shape: int, dtype: torch.dtype = saved) -> Tensor:
        return (torch.rand(shape) + 0.1).to(dtype)

    def stream(*shape: int) -> Tensor:
        return made(*shape, dtype=torch.float32)

    layer = (batch, tokens, channels)
    r, q, x, y, weight = stream(1, *layer), stream(1, *layer), made(*layer), made(*layer), made(channels)
    absz = y.float() + 1
    maps = (batch, heads, tokens, tokens)
    attention, dots, first, second = made(*maps), made(*maps), stream(1, *maps), stream(1, *maps)
    return {
        ("linear_alpha_beta_share_out", "beta 0"): (r, y, None, absz, 1.0, 0.0, 1e-6, *STABILISER),
        ("linear_alpha_beta_share_out", "beta 1"): (r, y, None, absz, 2.0, 1.0, 1e-6, *STABILISER),
        ("linear_alpha_beta_select", ""): (x, r, q),
        ("linear_epsilon_share_out", ""): (r, y, None, 1.0, *STABILISER),
        ("linear_epsilon_select", ""): (x, r),
        ("linear_gamma_share_out", ""): (r, y, None, absz, 0.25, False, False, *STABILISER),
        ("add_normalised", ""): (r, x, y, *STABILISER),
        ("add_epsilon", ""): (r, x, y, *STABILISER),
        ("add_gamma", ""): (r, x, y, 1.0, *STABILISER),
        ("fanout_epsilon", ""): ([r, q], x, *STABILISER),
        ("matmul_half_share", ""): (r, y, *STABILISER),
        ("matmul_half_attention_shares", ""): (attention, first, dots, *STABILISER),
        ("matmul_half_rollout_matrix", ""): (first, second),
        ("softmax_taylor", ""): (first, dots, attention),
        **{("activation_gradient", kind): (r, x, kind) for kind in ("gelu", "gelu_tanh", "silu")},
        ("activation_slope", ""): (r, x, y, *STABILISER),
        **{("norm_gradient", kind): (r, x, weight, kind, 1e-6) for kind in NORMS},
        **{("norm_sigma_constant", kind): (r, x, y, weight, kind, 1e-6, *STABILISER) for kind in NORMS},
    }


def tensors(values: Any) -> list[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, (tuple, list)) else []


def doubled(values: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(values, (tuple, list)):
        return type(values)(doubled(value) for value in values)
    return values.double() if isinstance(values, Tensor) else values


def error(op: str, arguments: Arguments) -> float:
    """The largest relative L2 error of a result to float64."""
    found, truth = tensors(SPECS[op].kernel(*arguments)), tensors(run_reference(op, doubled(arguments)))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def measure(
    op: str, variant: str, saved: torch.dtype, arguments: Arguments, threads: Iterable[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for every number of threads."""
    apart = error(op, arguments)
    if not apart < 1e-4:
        raise SystemExit(f"{op} {variant}: expected an error below 1e-4, got {apart:.3g}; nothing is timed")
    kernel: Callable[..., Any] = SPECS[op].kernel
    given = tensors(arguments)
    nbytes = sum(t.numel() * t.element_size() for t in (*given, *tensors(kernel(*arguments))))
    source, target = torch.zeros(2, nbytes // 8).unbind()
    found, before = [], torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        times = in_turn({"kernel": lambda: kernel(*arguments), "copy": lambda: target.copy_(source)}, rounds)
        ordered = sorted(times["kernel"])
        found.append(
            {
                "op": op,
                "variant": variant,
                "saved": str(saved).removeprefix("torch."),
                "shape": "x".join(map(str, given[0].shape)),
                "used_threads": count,
                "ms_median": 1e3 * statistics.median(ordered),
                "ms_p20": 1e3 * ordered[len(ordered) // 5],
                "ms_p80": 1e3 * ordered[(4 * len(ordered)) // 5],
                "mbytes": nbytes / 1e6,
                "gb_per_s": nbytes / 1e9 / statistics.median(ordered),
                "copy_gb_per_s": nbytes / 1e9 / statistics.median(times["copy"]),
                "share_of_copy": statistics.median(c / k for k, c in zip(times["kernel"], times["copy"], strict=True)),
                "rounds": rounds,
            }
        )
    torch.set_num_threads(before)
    return found


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--channels", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "elementwise_cpu.csv")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for saved in DTYPES:
        torch.manual_seed(0)
        named = cases(saved, given.batch, given.tokens, given.channels, given.heads)
        for (op, variant), arguments in named.items():
            found = measure(op, variant, saved, arguments, given.threads, given.rounds)
            for row in found:
                print(
                    f"{op:<28} {variant:<9} {row['saved']:<8} {row['used_threads']} thread(s)"
                    f" {row['ms_median']:>8.3f} ms {row['gb_per_s']:>6.1f} GB/s, {row['share_of_copy']:.2f} of a copy"
                )
            rows += found
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
