"""Builds relprop._C, the CPU kernels, and where there is an nvcc relprop._cuda, the CUDA kernels.

Plain C++17 and CUDA, no PyTorch headers, so no torch is needed to build.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# No errno, no traps: else comparisons keep loops from being vectorised; values, NaN and infinity stay as they are.
# No contraction to fused multiply-adds: every instruction set then gives the same bits.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra", "-g0"]


# Code for Ampere and for Hopper; later GPUs compile the PTX when it is first used. No kernel has instructions that only
# sm_90a knows, and PTX of compute_90a would run nowhere else.
NVCC_TARGETS = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Xfatbin", "-compress-all"]
ARCHITECTURES = "sm_80, sm_90, PTX"
OLDEST_NVCC = (11, 8)  # the first that knows sm_90
JOBS = int(os.environ.get("RELPROP_BUILD_JOBS") or min(4, os.cpu_count() or 1))


def stop(problem: str, remedy: str) -> None:
    """End the build with one line that says what is missing and what to do."""
    sys.exit(
        f"relprop: {problem}. {remedy}, or set RELPROP_NO_NATIVE=1 to install without the C++ kernels "
        "(the torch backend then does their work, more slowly)."
    )


def find_nvcc() -> tuple[str, str]:
    """nvcc, or an empty name and why the CUDA kernels are not built."""
    if os.environ.get("RELPROP_NO_CUDA", "") not in ("", "0"):
        return "", "RELPROP_NO_CUDA was set when relprop was built"
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return "", "no nvcc (CUDA compiler) was found when relprop was built; set CUDA_HOME where it is not on PATH"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or tuple(map(int, release.groups())) < OLDEST_NVCC:
        found = release.group(0) if release else "no version"
        return "", f"expected nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer, got {found} of {nvcc}"
    return nvcc, ""


def build_cuda(nvcc: str, sources: list[str], objects: list[str], scratch: str, target: str) -> None:
    """Compile the .cu files and link them with the objects of the binding files; the CUDA runtime is linked in."""

    def run(*arguments: str) -> None:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
            sys.exit(
                f"relprop: nvcc failed on {arguments[-3]} (messages above). Repair the CUDA toolkit, or set "
                "RELPROP_NO_CUDA=1 to install without the CUDA kernels."
            )

    def compile_one(source: str) -> str:
        made = str(Path(scratch) / f"{Path(source).stem}.cu.o")
        run(*NVCC_FLAGS, *NVCC_TARGETS, f'-DRELPROP_CUDA_ARCHITECTURES="{ARCHITECTURES}"', "-c", source, "-o", made)
        return made

    Path(scratch).mkdir(parents=True, exist_ok=True)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=JOBS) as pool:
        compiled = list(pool.map(compile_one, sorted(sources, key=os.path.getsize, reverse=True)))
    run("-shared", "-cudart", "static", *compiled, *objects, "-o", target)


def extensions() -> tuple[list, dict]:
    """The extension and its build command, or none where RELPROP_NO_NATIVE asks for none."""
    if os.environ.get("RELPROP_NO_NATIVE", "") not in ("", "0"):
        print("relprop: RELPROP_NO_NATIVE is set: the C++ kernels are not built", file=sys.stderr)
        return [], {}
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
        from pybind11.setup_helpers import build_ext as pybind11_build_ext
    except ImportError:
        stop("pybind11 is missing in the build environment", "Install pybind11 or build with isolation")

    nvcc, no_cuda = find_nvcc()
    if no_cuda:
        print(f"relprop: the CUDA kernels are not built: {no_cuda}", file=sys.stderr)

    class build_ext(pybind11_build_ext):
        """Checks for what the build needs first, and compiles the version in."""

        def build_extensions(self) -> None:
            command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
            program = shlex.split(command)[0]
            if shutil.which(program) is None:
                stop(f"no C++ compiler found (looked for {program!r})", "Install one (g++ or clang++) or set CXX")
            if not any((Path(folder) / "Python.h").is_file() for folder in self.include_dirs):
                stop("Python.h not found", "Install the Python development package (python3-dev, python3-devel)")
            version = self.distribution.get_version()
            for extension in self.extensions:
                extension.define_macros.append(("RELPROP_VERSION", f'"{version}"'))
                extension.define_macros.append(("RELPROP_NO_CUDA_REASON", f'"{no_cuda}"'))
            super().build_extensions()

        def build_extension(self, extension: Pybind11Extension) -> None:
            kernels = [source for source in extension.sources if source.endswith(".cu")]
            if not kernels:
                super().build_extension(extension)
                return
            objects = self.compiler.compile(
                [source for source in extension.sources if not source.endswith(".cu")],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                extra_postargs=extension.extra_compile_args,
            )
            build_cuda(nvcc, kernels, objects, self.build_temp, self.get_ext_fullpath(extension.name))

    def sources(*patterns: str) -> list[str]:
        return sorted({f"csrc/{path.name}" for pattern in patterns for path in (ROOT / "csrc").glob(pattern)})

    ParallelCompile("RELPROP_BUILD_JOBS", default=JOBS).install()
    of_cuda = sources("*.cu", "*cuda_bindings.cpp")
    extension = {
        "depends": sources("*.h", "*.cuh"),
        "extra_compile_args": FLAGS,
        "libraries": ["dl"] if sys.platform.startswith("linux") else [],
        "cxx_std": 17,
    }
    wanted = [Pybind11Extension("relprop._C", sorted({*sources("*.cpp")} - {*of_cuda}), **extension)]
    if not no_cuda:
        wanted.append(Pybind11Extension("relprop._cuda", of_cuda, **extension))
    return wanted, {"build_ext": build_ext}


# kernels/ ships as relprop.kernels (package-dir in pyproject.toml), which a search below relprop/ cannot find.
packages = find_packages(str(ROOT), include=["relprop", "relprop.*"])
packages += ["relprop.kernels", *(f"relprop.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]
if __name__ == "__main__":  # else CI and tests read what is above
    ext_modules, cmdclass = extensions()
    setup(packages=packages, ext_modules=ext_modules, cmdclass=cmdclass)
