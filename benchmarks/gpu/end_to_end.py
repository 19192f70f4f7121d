"""Whole explanations of ViT-B/16 on the device, beside the model's own forward and backward pass.

    python -m benchmarks.gpu.end_to_end [--dry-run] [--out FOLDER]

Writes end_to_end.csv. The float32 answer of each backend is first held to the torch backend's on the same device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

import relprop
from benchmarks.gpu.machine import Machine, machine_of

SETTINGS = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest"), "tf32": (torch.float32, "high")}


def model_of(machine: Machine) -> Any:
    """ViT-B/16 with random weights; a tiny one in a dry run."""
    torch.manual_seed(0)
    if machine.dry:
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
        return timm.models.VisionTransformer(**sizes).eval()
    return timm.create_model("vit_base_patch16_224", pretrained=False).eval().to(machine.device)


def contenders(model: Any, images: Tensor, precision: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    targets = torch.full((len(images),), 5, device=images.device)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def forward_backward() -> None:
        leaf = images.clone().requires_grad_()
        model(leaf)[:, 5].sum().backward()

    found: dict[str, Callable[[], Any]] = {"forward": forward, "forward_backward": forward_backward}
    for backend in ("triton", "torch"):
        for composite in ("chefer", "chefer_stable"):
            engine = relprop.compile(model, (images,), composite=composite, backend=backend, precision=precision)
            found[f"relprop_{backend}_{composite}"] = lambda engine=engine: engine(images, target=targets)
    return found


def check(machine: Machine, model: Any, images: Tensor) -> float:
    """Relative error of the float32 answer of the well-conditioned composite."""

    def answer(backend: str) -> Tensor:
        engine = relprop.compile(model, (images,), composite="chefer_stable", backend=backend)
        return engine(images, target=5).relevance[:, 1:].double()

    truth = answer("torch")
    error = float((answer("triton") - truth).norm() / truth.norm())
    machine.add(run="check_float32_stable", batch=len(images), error=error)
    return error


def main(machine: Machine) -> int:
    """Rows of end_to_end.csv."""
    model = model_of(machine)
    side = 32 if machine.dry else 224
    if not check(machine, model, machine.randn(2, 3, side, side)) < 1e-3:
        machine.write("end_to_end")
        print("expected the Triton answer to be that of the torch backend; nothing is timed")
        return 1
    for name, (dtype, precision) in SETTINGS.items():
        made = copy.deepcopy(model).to(dtype)
        for batch in (1, machine.size(64, 2)):
            images = machine.randn(batch, 3, side, side, dtype=dtype)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            base = None
            for run, function in contenders(made, images, precision).items():
                found = machine.time(function)
                base = base or found["ms"]
                rates = {"explanations_s": 1e3 * batch / found["ms"], "over_forward": found["ms"] / base}
                machine.add(run=run, dtype=name, batch=batch, **rates, **found)
                machine.write("end_to_end")
            torch.set_float32_matmul_precision(before)
        if machine.dry:
            break
    return 0


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
