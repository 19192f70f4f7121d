"""What nvcc makes of the CUDA kernels: no spills, and nothing beyond what a block may have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.emulated import CSRC

NVCC = shutil.which("nvcc")
SOURCES = sorted(CSRC.glob("*.cu"), key=lambda path: path.name)
QUICK = "linear_back.cu"  # the frame of all products

REGISTERS = 65536  # of a multiprocessor, shared by a block's threads; each gets a multiple of 8
MOST_SHARED = 48 * 1024  # of one block, not counting what is asked for at launch

# One report of ptxas -v.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:(?P<shared>\d+) bytes smem[^\n]*)?\n",
    re.DOTALL,
)

# Of the launch, which is what __launch_bounds__ says.
THREADS = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


def source_cases() -> list[object]:
    return [pytest.param(s, marks=[] if s.name == QUICK else pytest.mark.full, id=s.name) for s in SOURCES]


@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.full), "90"])
@pytest.mark.parametrize("source", source_cases())
def test_resources(source: Path, architecture: str, tmp_path: Path) -> None:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", target]
    flags += ["--keep", "--keep-dir", str(tmp_path)]
    done = subprocess.run(
        [str(NVCC), *flags, "-c", str(source), "-o", str(tmp_path / "made.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / f"{source.stem}.ptx").read_text()
    threads = {name: int(count) for name, count in THREADS.findall(ptx)}
    kernels = [found.groupdict() for found in KERNEL.finditer(done.stderr)]
    assert len(kernels) == done.stderr.count("Compiling entry function"), done.stderr
    assert kernels or "__global__" not in source.read_text()
    for kernel in kernels:
        assert kernel["architecture"] == f"sm_{architecture}"
        assert kernel["stores"] == kernel["loads"] == "0", kernel
        registers = -(-int(kernel["registers"]) // 8) * 8
        assert registers * threads[kernel["name"]] <= REGISTERS, kernel
        assert int(kernel["shared"] or 0) <= MOST_SHARED, kernel


def test_every_kernel_says_how_many_threads_it_has() -> None:
    """Without launch bounds a compiler may use more registers than the block that is launched can have."""
    for path in sorted([*SOURCES, *CSRC.glob("*.cuh")]):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for found in re.finditer(r"__global__\s+void\s*(\S+)", text):
            assert found.group(1).startswith("__launch_bounds__"), f"{path.name}: {found.group(0)}"
