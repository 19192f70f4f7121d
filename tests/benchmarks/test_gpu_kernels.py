"""The GPU session's cases have every Triton kernel, and are compiled before they run. CUDA's: tests/csrc."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Compiles one launch as `compiled_first` does, then launches' twins on tensors with numbers: none is compiled again.
TWICE = """
import os, pickle, sys, torch, triton
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from triton.backends.compiler import GPUTarget
from benchmarks.gpu import compiled_first
from benchmarks.gpu.kernels import chosen
from benchmarks.gpu.machine import Machine
from relprop.kernels.launch import recording

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

triton.runtime.driver.set_active(Driver())
if sys.argv[1] == "outline":
    launches = list(compiled_first.of_cases(90, False))
else:
    class OnCpu(Machine):
        device = torch.device("cpu")
    with recording(90) as launches:
        for case, backend in chosen(OnCpu(False, Path(), tiny=True, backends=("triton",)), large=False):
            case.runs[backend]()
for launch in launches:
    if launch.kernel.__name__ in ("_softmax_taylor_kernel", "_fanout_epsilon_kernel"):
        order = pickle.loads(ForkingPickler.dumps(compiled_first.Order.of(launch)))  # as another process gets it
        assert compiled_first.compile_one(order)[2] == ""
print("kernels", sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))
"""
# Passes that run, their launches written down: how many there are, and how many `compiled_first` does not compile.
ENGINES = """
import torch
from pathlib import Path
from benchmarks.gpu import compiled_first
from benchmarks.gpu.contenders import engine_of, images, vit
from benchmarks.gpu.machine import Machine
from relprop.kernels.launch import recording

machine = Machine(True, Path())
compiled = {compiled_first._key(launch) for launch in compiled_first.launches(90, dry=True)}
model, given = vit(machine), images(machine, 2)
for method in ("transformer_attribution", "attnlrp"):
    for index in ([5], [5, 7]):
        engine = engine_of(machine, model, given, False, method=method, tape=False)
        with recording(90) as launches:
            engine(given, target=torch.tensor([index] * 2))
        print("launched", len(launches), len({compiled_first._key(launch) for launch in launches} - compiled))
"""


def test_every_kernel_has_a_case(tmp_path: Path) -> None:
    import relprop.kernels
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.compiled_first import Outline
    from relprop.kernels.launch import recording

    written, functions = set(), set()
    for found in pkgutil.iter_modules(relprop.kernels.__path__):
        module = importlib.import_module(f"relprop.kernels.{found.name}")
        written |= {name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
        own = inspect.getmembers(module, lambda f, m=module: inspect.isfunction(f) and f.__module__ == m.__name__)
        functions |= {name for name, _ in own if name.startswith(found.name) and found.name != "launch"}
    for large in (False, True):
        with recording(90) as launches:
            made = list(cases(Outline(False, tmp_path), large=large))
            for case in made:
                if "triton" in case.runs:
                    case.runs["triton"]()
        launched = {getattr(launch.kernel, "fn", launch.kernel).__name__ for launch in launches}
        assert launched >= written
        assert functions <= {case.op for case in made if "triton" in case.runs}
        assert {("layer", "norm_sigma_constant"), ("d256", "attention_relevance")} <= {(c.variant, c.op) for c in made}


def test_what_is_compiled_first_is_not_compiled_again(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for way in ("outline", "numbers"):
        done = subprocess.run(
            [sys.executable, "-c", TWICE, way], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(int(done.stdout.split()[-1]))
    assert said[0] == said[1] >= 8


def test_what_engines_launch_is_compiled_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("launched")]
    assert len(lines) == 4 and all(int(count) > 4 and missing == "0" for _, count, missing in lines)
