"""The C++ sources on another architecture, and one binary under several versions of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relprop import native

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Werror",
]
SOURCES = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if "bindings" not in path.name)
ARM = "aarch64-linux-gnu-g++"
OTHER = "RELPROP_OTHER_TORCH"  # names a Python that has the oldest torch, and sees this checkout


@pytest.mark.full
@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"no {ARM} (Debian, Ubuntu: g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_aarch64(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [ARM, *FLAGS, "-fPIC", "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


PROBE = """
import torch
from relprop import native
assert native.available()[0], native.available()[1]
r, x = torch.ones(1, 2, 4), torch.ones(2, 4)
assert torch.equal(native.select(x, r, r), r)
assert torch.equal(native.add_gamma(r, x, x, gamma=1.0, stabiliser=(0, 0.0))[0], r / 2)
assert native.select(x, r, r, dtype=torch.bfloat16).dtype is torch.bfloat16
print(torch.__version__, native._C.__file__, native.info()["openmp"])
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    """A Python with the oldest torch that is supported: the given one, or one of an environment made for it."""
    if given := os.environ.get(OTHER):
        yield given
        return
    room = shutil.disk_usage(tmp_path).free
    if room < 12 << 30:
        pytest.skip(f"two versions of torch need about 12 GiB of disk; {room >> 30} GiB are free")
    environment = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", str(environment)).returncode == 0
    python = str(environment / "bin" / "python")
    old = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-cache-dir"),
        *("--prefix", str(environment), "torch==2.11.*"),
    )
    if old.returncode != 0:
        pytest.skip(f"torch 2.11 cannot be installed here: {old.stderr.strip().splitlines()[-1]}")
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # After its own packages: what torch does not need comes from here, the compiled module included.
    lent = [str(ROOT), *(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))]
    (packages / "lent.pth").write_text("\n".join(lent))
    yield python
    shutil.rmtree(environment)


@pytest.mark.full
@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_one_binary_under_two_versions_of_torch(other: str) -> None:
    """The compiled module of this environment, here and under the oldest torch that is supported."""
    found = [run(python, "-c", PROBE) for python in (sys.executable, other)]
    for done in found:
        assert done.returncode == 0, done.stderr
    now, then = (done.stdout.split() for done in found)
    assert then[0].startswith("2.11.") and not now[0].startswith("2.11.")
    assert now[1] == then[1], "two binaries"
