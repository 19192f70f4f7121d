"""A pass exported to one file runs where relprop cannot be imported, and answers what the engine answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import relprop
from relprop.errors import OptionError
from tests.engine.models import vit

RUNNER = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "relprop":
            raise ImportError("relprop is not here")
sys.meta_path.insert(0, Refuse())
import torch
path, compiled, data = sys.argv[1], sys.argv[2] == "True", torch.load(sys.argv[3])
run = torch._inductor.aoti_load_package(path) if compiled else torch.export.load(path).module()
torch.save([tuple(t for t in run(*inputs)) for inputs in data], sys.argv[3])
assert not any(name.split(".")[0] == "relprop" for name in sys.modules)
"""


def elsewhere(path: Path, compiled: bool, calls: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """Answers of a process of its own, in a folder without relprop."""
    data = path.parent / "calls.pt"
    torch.save(calls, data)
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER, str(path), str(compiled), str(data)],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(data)


def check(model: nn.Module, path: Path, compiled: bool, method: str = "transformer_attribution") -> None:
    """With targets, at batch sizes other than the example's."""
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    target = torch.tensor([[1, 4], [0, 9], [3, 3], [7, 2], [5, 6]])
    engine = relprop.compile(model, (images[:2],), method=method, composite="chefer_stable")
    engine.export(path, targets=2, compiled=compiled)
    calls = [(images, target), (images[:1], target[:1])]
    for (given, index), (relevance, logits, kept) in zip(calls, elsewhere(path, compiled, calls), strict=True):
        want = engine(given, target=index)
        torch.testing.assert_close(relevance, want.relevance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(logits, want.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept, index)


def test_runs_without_relprop(tmp_path: Path) -> None:
    check(vit(depth=1), tmp_path / "pass.pt2", False)


@pytest.mark.full
@pytest.mark.parametrize("method", ["attention_gradcam", "full"])
def test_other_methods(tmp_path: Path, method: str) -> None:
    check(vit(depth=2), tmp_path / "pass.pt2", False, method)


@pytest.mark.full
def test_the_largest_output_ahead_of_time(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    engine = relprop.compile(vit(depth=1), (images[:2],), composite="chefer_stable")
    path = engine.export(tmp_path / "pass.pt2", compiled=True)
    ((relevance, logits, kept),) = elsewhere(path, True, [(images,)])
    want = engine(images)
    torch.testing.assert_close(relevance, want.relevance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, want.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(kept, want.target)


@pytest.mark.parametrize("targets", [0, -1, True, 1.5])
def test_bad_numbers_of_targets(tmp_path: Path, targets: object) -> None:
    engine = relprop.compile(vit(depth=1), (torch.randn(2, 3, 32, 32),))
    with pytest.raises(OptionError, match="targets: expected None or a positive int, got"):
        engine.export(tmp_path / "pass.pt2", targets=targets)
