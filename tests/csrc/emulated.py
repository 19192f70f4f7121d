"""Builds .cu sources for the host emulation of csrc/emulation, as Python modules whose kernels run on the CPU.

The modules lie in build/emulation, named by a hash of all that went into them: a run that finds its module there
compiles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
FLAGS += ["-Wno-unknown-pragmas", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]

# Set in a process that AddressSanitizer's runtime is loaded in: the kernels are then built with it.
SANITIZE_KERNELS = "RELPROP_SANITIZE_KERNELS"


def reason_against() -> str:
    """Why nothing can be built here; empty where it can."""
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler ({COMPILER[0]!r}) to build the emulation with"
    return ""


def _key(sources: Sequence[Path], flags: Sequence[str]) -> str:
    headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(" ".join([*COMPILER, *flags, sysconfig.get_config_var("EXT_SUFFIX")]).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, sources: Sequence[Path], sanitize: bool = False) -> Path:
    """The extension module `name` from .cu and .cpp sources.

    Returns:
        its file.
    """
    import pybind11

    sources = [*sources, CSRC / "emulation" / "emulation.cpp"]
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    folder = ROOT / "build" / "emulation" / f"{name}-{_key(sources, flags)}"
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]

    def run(command: Sequence[str | Path]) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stderr}")

    def compile_one(source: Path) -> Path:
        made = scratch / f"{source.stem}.o"
        run([*COMPILER, *flags, *includes, "-x", "c++", "-c", source, "-o", made])
        return made

    with ThreadPoolExecutor(max_workers=2) as pool:
        largest_first = sorted(sources, key=lambda path: -path.stat().st_size)
        objects = list(pool.map(compile_one, largest_first))
    run([*COMPILER, "-shared", *(SANITIZE if sanitize else []), *objects, "-o", scratch / module.name])
    folder.mkdir(exist_ok=True)
    os.replace(scratch / module.name, module)  # another process may have built the same meanwhile
    shutil.rmtree(scratch)
    return module


def build_cuda_module(sanitize: bool = False) -> Path:
    """relprop._cuda from all of csrc's CUDA sources."""
    return build("_cuda", [*CSRC.glob("*.cu"), *CSRC.glob("*cuda_bindings.cpp")], sanitize)


def sanitizer_libraries() -> list[str]:
    """What must be loaded before a Python that is not built with AddressSanitizer; empty where there is none.

    Its runtime, and libstdc++, whose exceptions it looks for when it starts.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        done = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True)
        if not os.path.isabs(done.stdout.strip()):
            return []
        found.append(os.path.realpath(done.stdout.strip()))
    return found


def run_sanitized(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with AddressSanitizer's runtime, in which modules built with `sanitize` can be loaded."""
    options = {
        "LD_PRELOAD": " ".join(sanitizer_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **options, **environment},
        capture_output=True,
        text=True,
    )


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
