"""The package as pip builds it in isolation: what a wheel, a source archive and an editable install hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.nvcc import NO_NVCC, NVCC

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.full

# Run where torch is at hand but relprop is only what was just built.
PROBE = """
import sys, relprop.kernels
from relprop import native
assert native.available()[0], native.available()[1]
print(relprop.__path__[0], relprop.kernels.__path__[0], native._C.__file__, native.info()["version"], sep="\\n")
"""

# In a process of its own: what the CUDA module says of itself, with no driver in the way of the import.
CUDA_PROBE = """
import torch
from relprop import _cuda, native, native_cuda
assert native.info()["cuda"], native.info()
usable, reason = native_cuda.available()
if not usable:
    assert reason.startswith("no CUDA device"), reason
    pointer = torch.ones(4).data_ptr()
    try:
        _cuda.matmul_half_share((0, 0, 0, 0), pointer, pointer, pointer, 1, 4, (0, 1.0))
    except RuntimeError as error:
        assert "CUDA driver" in str(error) or "no CUDA-capable device" in str(error), error
    else:
        raise AssertionError("a launch without a GPU")
print(_cuda.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Without CUDA kernels, which take minutes, unless the environment says otherwise."""
    environment = {"RELPROP_NO_CUDA": "1", **environment}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RELPROP_NO_NATIVE")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def checkout(folder: Path) -> Path:
    """A copy to build in: nothing left over from earlier builds, nobody else building at the same time."""
    copy = folder / "checkout"
    left = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist", "*.egg-info", "demo-output")
    shutil.copytree(ROOT, copy, ignore=left)
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, checkout(folder), cwd=folder)
    (built,) = folder.glob("relprop-*.whl")
    return built


def environment(folder: Path) -> Path:
    """A new environment that sees this one's packages through a path entry, which runs no editable install."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours = run(sys.executable, "-c", show, cwd=folder)
    theirs = run(python, "-c", show, cwd=folder).strip()
    (Path(theirs) / "dependencies.pth").write_text(ours)
    return python


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("relprop/_C.") and name.endswith(".so") for name in names)
    assert not any(name.startswith("relprop/_cuda.") for name in names)
    assert {"relprop/kernels/__init__.py", "relprop/native/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"relprop", wheel.name.split("-cp")[0] + ".dist-info"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "relprop").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert sources <= set(names)
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "relprop" / "demo").rglob("*.safetensors")}
    assert weights <= set(names)


def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    package, kernels, module, version = run(python, "-c", PROBE, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tmp_path) and Path(module).is_relative_to(package)
    assert Path(kernels) == Path(package) / "kernels"
    assert f"relprop-{version}-" in wheel.name
    info = run(tmp_path / "venv" / "bin" / "relprop", "info", cwd=tmp_path)
    assert "not built: RELPROP_NO_CUDA was set when relprop was built" in info


@pytest.mark.skipif(not NVCC, reason=NO_NVCC)
def test_wheel_with_cuda_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, checkout(tmp_path)]
    run(*command, cwd=tmp_path, RELPROP_NO_CUDA="")
    (wheel,) = tmp_path.glob("relprop-*.whl")
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    module = run(python, "-c", CUDA_PROBE, cwd=tmp_path).strip()
    assert Path(module).is_relative_to(tmp_path)
    assert "libcudart" not in run("ldd", module, cwd=tmp_path)
    assert "built by nvcc" in run(tmp_path / "venv" / "bin" / "relprop", "info", cwd=tmp_path)


def test_an_old_nvcc_is_one_clear_reason(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 10.2, V10.2.89'\n")
    nvcc.chmod(0o755)
    done = build_extension(tmp_path, RELPROP_NO_CUDA="", CUDA_HOME=str(tmp_path), CXX="no-such-compiler")
    assert "relprop: the CUDA kernels are not built: expected nvcc 11.8 or newer, got release 10.2" in done.stderr


def test_editable_install(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    copy = checkout(tmp_path)
    run(python, "-m", "pip", "install", "--no-deps", "--editable", copy, cwd=tmp_path)
    package, kernels, module, _ = run(python, "-c", PROBE, cwd=tmp_path).split()
    assert Path(package) == copy / "relprop" and Path(module).is_relative_to(package)
    assert Path(kernels) == copy / "kernels"


def test_source_archive_builds(tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    backend = "from setuptools import build_meta; print(build_meta.build_sdist(__import__('sys').argv[1]))"
    name = run(sys.executable, "-c", backend, tmp_path, cwd=copy).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        names = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert wanted <= names and "kernels/__init__.py" in names and "LICENSE" in names
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / name, cwd=tmp_path)


def build_extension(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout(tmp_path),
        env={**os.environ, "RELPROP_NO_CUDA": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_missing_compiler_is_one_clear_line(tmp_path: Path) -> None:
    done = build_extension(tmp_path, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "relprop: no C++ compiler found (looked for 'no-such-compiler'). Install one (g++ or clang++)" in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_can_be_left_out(tmp_path: Path) -> None:
    done = build_extension(tmp_path, CXX="no-such-compiler", RELPROP_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "relprop: RELPROP_NO_NATIVE is set: the C++ kernels are not built" in done.stderr
