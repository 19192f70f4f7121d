"""`python -m relprop.demo`, with scenes and weights of the test's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from relprop.demo import Scene
from relprop.demo import __main__ as demo
from relprop.images import load_image


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch, digits_model: VisionTransformer) -> dict[str, Scene]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for digits in ((3, 7), (0, 4), (5,)):
        pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        labels = torch.zeros(10)
        labels[list(digits)] = 1
        found["scene_" + "_".join(map(str, digits))] = Scene(pixels, labels, torch.zeros(10, 64, 64).bool(), pixels)
    monkeypatch.setattr(demo, "bundled_scenes", lambda: found)
    monkeypatch.setattr(demo, "load_model", lambda: digits_model)
    return found


def test_one_picture_per_scene_and_an_overview(
    scenes: dict[str, Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--out", str(tmp_path / "out")]) == 0
    names = [f"{name}.png" for name in scenes] + ["overview.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    sizes = {name: load_image(tmp_path / "out" / name).size for name in names}
    assert sizes["scene_3_7.png"] == (3 * 264 + 8, 256 + 2 * 8 + 19)
    assert sizes["scene_5.png"] == (2 * 264 + 8, 256 + 2 * 8 + 19)  # one digit, one map
    assert 800 < sizes["overview.png"][0] < 1100
    drawn = np.asarray(load_image(tmp_path / "out" / "scene_3_7.png"))
    assert not np.array_equal(drawn[27:283, 272:528], drawn[27:283, 536:792])  # each digit has its own map


def test_weights_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("relprop.demo.model.WEIGHTS", tmp_path / "no.safetensors")
    assert demo.main(["--out", str(tmp_path / "out")]) == 1
    text = f"relprop: error: expected the demo weights at {tmp_path / 'no.safetensors'}, got no such file; train them"
    assert capsys.readouterr().err.startswith(text)
    assert not (tmp_path / "out").exists()


def test_output_is_a_file(scenes: dict[str, Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--out", str(tmp_path / "file")]) == 1
    assert "expected a folder to write to, got" in capsys.readouterr().err
