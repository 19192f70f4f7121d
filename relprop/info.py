"""What is installed and what it can do, as text: `relprop info` and `relprop methods`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import textwrap
from typing import Any

import torch

from relprop import native, native_cuda
from relprop.backends import backends
from relprop.composites import COMPOSITES
from relprop.methods import METHODS
from relprop.ops import on_gpu

__all__ = ["describe_installation", "describe_methods", "installation"]

PACKAGES = (
    "relprop",
    "torch",
    "timm",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "matplotlib",
    "tqdm",
)

_Block = tuple[str, tuple[str, ...]]  # name, paragraphs


def _version(package: str) -> str:
    if package == "relprop":  # run from a checkout it has no metadata
        from relprop import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installation() -> dict[str, dict[str, str]]:
    """Versions, the machine, backends with why any is unavailable, and how the kernels were built.

    Returns:
        sections by title, each from name to text.
    """
    built = native.info()
    kernels = {"C++": "available" if built["available"] else f"unavailable: {built['reason']}"}
    if built["available"]:
        kernels |= {
            "compiler": str(built["compiler"]),
            "instruction set": f"{built['isa']} (built: {', '.join(built['isas_built'])};"
            f" this CPU: {', '.join(built['isas_supported'])})",
            "OpenMP": str(built["openmp"]) or "none",
        }
    kernels["CUDA kernels"] = _cuda_kernels(built)
    kernels["custom ops on a GPU"] = _ops_on_gpu()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "CPU": f"{os.cpu_count()} processors, torch uses {torch.backends.cpu.get_cpu_capability()}"
            f" on {torch.get_num_threads()} threads",
            "GPU": ", ".join(devices) or f"none that torch can use (torch built for CUDA {torch.version.cuda or '-'})",
        },
        "backends": backends(),
        "kernels": kernels,
    }


def _cuda_kernels(built: dict[str, Any]) -> str:
    if not built.get("cuda"):
        return f"not built: {built.get('cuda_reason') or 'there are no compiled kernels at all'}"
    found = native_cuda.info()
    made = f"built by {found['compiler']}" if "compiler" in found else "built"
    return made if found["available"] else f"{made}; unavailable: {found['reason']}"


def _ops_on_gpu() -> str:
    kernels = {"CUDA": sorted(on_gpu.CUDA) if native_cuda.available()[0] else []}
    kernels["Triton"] = sorted(on_gpu.TRITON) if importlib.util.find_spec("triton") else []
    found = "; ".join(f"{name}: {', '.join(ops)}" for name, ops in kernels.items() if ops)
    return f"{found or 'no kernels'}; the other ops run as plain PyTorch"


def describe_installation() -> str:
    """`installation` as aligned lines."""
    sections = installation()
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {name:<{width}}  {text}" for name, text in section.items()), ""]
    return "\n".join(lines[:-1])


def describe_methods(width: int = 100) -> str:
    """Every method with what it answers, its options, default composite and source, then every composite.

    Args:
        width: of the lines, in characters.
    """
    blocks: list[_Block] = []
    for name, method in METHODS.items():
        answer = method.summary + ("" if method.output == "tokens" else "; signed, one value per pixel or input token")
        given = ", ".join(f"{key}={value}" for key, value in method.options.items()) or "none"
        target = "" if method.uses_target else "; the same for every class"
        blocks.append((name, (answer, f"options: {given}; composite: {method.composite}{target}", method.source)))
    rules: list[_Block] = [
        (name, tuple(text for text in (composite.summary, composite.source) if text))
        for name, composite in COMPOSITES.items()
    ]
    indent = max(len(name) for name, _ in blocks + rules) + 4
    return "\n".join(["methods", *_table(blocks, indent, width), "", "composites", *_table(rules, indent, width)])


def _table(blocks: list[_Block], indent: int, width: int) -> list[str]:
    lines = []
    for name, texts in blocks:
        column = [line for text in texts for line in textwrap.wrap(text, max(30, width - indent))]
        lines.append(f"  {name:<{indent - 2}}{column[0]}" if column else f"  {name}")
        lines += [" " * indent + line for line in column[1:]]
    return lines
