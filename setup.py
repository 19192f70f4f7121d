"""Builds relprop._C, the CPU kernels: plain C++17, no PyTorch headers, so no torch is needed to build.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# No errno, no traps: else comparisons keep loops from being vectorised; values, NaN and infinity stay as they are.
# No contraction to fused multiply-adds: every instruction set then gives the same bits.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra", "-g0"]


def stop(problem: str, remedy: str) -> None:
    """End the build with one line that says what is missing and what to do."""
    sys.exit(
        f"relprop: {problem}. {remedy}, or set RELPROP_NO_NATIVE=1 to install without the C++ kernels "
        "(the torch backend then does their work, more slowly)."
    )


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
            super().build_extensions()

    ParallelCompile("RELPROP_BUILD_JOBS", default=min(4, os.cpu_count() or 1)).install()
    return [
        Pybind11Extension(
            "relprop._C",
            sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.h")),
            extra_compile_args=FLAGS,
            libraries=["dl"] if sys.platform.startswith("linux") else [],
            cxx_std=17,
        )
    ], {"build_ext": build_ext}


# kernels/ ships as relprop.kernels (package-dir in pyproject.toml), which a search below relprop/ cannot find.
packages = find_packages(str(ROOT), include=["relprop", "relprop.*"])
packages += ["relprop.kernels", *(f"relprop.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]
ext_modules, cmdclass = extensions()
setup(packages=packages, ext_modules=ext_modules, cmdclass=cmdclass)
