"""What nvcc makes of the CUDA kernels: no spills, and nothing beyond what a block may have.

Shared memory that is asked for at launch is no part of a compiler's report: the host emulation holds it, together with
what is reported here, to a block's 163 KiB on sm_80, at every launch (csrc/emulation/emulation.cpp).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.emulated import CSRC
from tests.nvcc import NO_NVCC, NVCC, SETUP

# The largest first: two processes then end at about the same time.
SOURCES = sorted(CSRC.glob("*.cu"), key=lambda path: -path.stat().st_size)
QUICK = "linear_back.cu"  # the frame of all products
ARCHITECTURES = ("80", "90")

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


def cases() -> Iterator[Any]:
    for source, architecture in product(SOURCES, ARCHITECTURES):
        quick = source.name == QUICK and architecture == ARCHITECTURES[-1]
        yield pytest.param(
            source, architecture, marks=[] if quick else pytest.mark.full, id=f"{source.name}-sm_{architecture}"
        )


def test_nvcc_is_looked_for_where_the_build_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "bin" / "nvcc"
    made.parent.mkdir()
    made.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    made.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("RELPROP_NO_CUDA", "")
    assert SETUP["find_nvcc"]() == (str(made), "")
    monkeypatch.setenv("RELPROP_NO_CUDA", "1")
    assert SETUP["find_nvcc"]() == ("", "RELPROP_NO_CUDA was set when relprop was built")


def test_architectures_are_those_that_are_built() -> None:
    assert re.findall(r"sm_(\d+)", " ".join(SETUP["NVCC_TARGETS"])) == list(ARCHITECTURES)


@pytest.mark.skipif(not NVCC, reason=NO_NVCC)
@pytest.mark.parametrize(("source", "architecture"), cases())
def test_resources(source: Path, architecture: str, tmp_path: Path) -> None:
    """The device's half alone; the host's is compiled where relprop is built."""
    flags = [*SETUP["NVCC_FLAGS"], f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
    flags += ["-cubin", "--keep", "--keep-dir", str(tmp_path)]
    done = subprocess.run(
        [NVCC, *flags, str(source), "-o", str(tmp_path / "made.cubin")], capture_output=True, text=True
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
