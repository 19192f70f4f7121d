"""What the device can do: bandwidth of a copy, rates of torch's matrix products.

python -m benchmarks.gpu.ceilings [--dry-run] [--out FOLDER]
"""

from __future__ import annotations

import torch

from benchmarks.gpu.machine import Machine, machine_of


def main(machine: Machine) -> None:
    """Rows of ceilings.csv."""
    machine.begin("ceilings")
    size = machine.size(2**30, 2**16)
    source = torch.empty(size, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    found = machine.time(lambda: target.copy_(source))
    machine.add(ceiling="copy_gb_s", value=2 * size / found["ms"] / 1e6, **found)
    for name, dtype, precision in (
        ("bf16_tflop_s", torch.bfloat16, "highest"),
        ("tf32_tflop_s", torch.float32, "high"),
        ("fp32_tflop_s", torch.float32, "highest"),
    ):
        best: dict[str, float] = {}
        for n in (machine.size(4096, 64), machine.size(8192, 64)):
            a, b = machine.randn(n, n, dtype=dtype, seed=1), machine.randn(n, n, dtype=dtype, seed=2)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                found = machine.time(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            finally:
                torch.set_float32_matmul_precision(before)
            rate = 2 * n**3 / found["ms"] / 1e9
            if rate > best.get("value", 0.0):
                best = {"value": rate, "n": n, **found}
        machine.add(ceiling=name, **best)


if __name__ == "__main__":
    main(machine_of())
