from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relprop.errors import MissingDependencyError, NonFiniteError, OptionError, OutputError, ShapeError
from relprop.pictures import enlarge, normalise, overlay, panel, save_png
from relprop.pictures.colours import picture_range, shown, shown_range

GREY = Image.new("RGB", (40, 20), (128, 128, 128))


def test_unsigned_runs_from_0_to_1_and_signed_keeps_0() -> None:
    heat = np.array([[1.0, 3.0], [2.0, 5.0]])
    assert normalise(heat).tolist() == [[0, 0.5], [0.25, 1]]
    assert normalise(torch.tensor([[-4.0, 0.0], [2.0, 1.0]]), signed=True).tolist() == [[-1, 0], [0.5, 0.25]]


def test_zero_map_leaves_the_image_alone() -> None:
    assert np.array_equal(np.asarray(overlay(GREY, np.zeros((2, 4)))), np.asarray(GREY))


def test_ground_of_signed_maps_is_soft_and_grey() -> None:
    """No colour of the photograph, and of its contrast what leaves dark and light places light."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    ground = np.asarray(overlay(image, np.zeros((2, 4)), signed=True)).astype(int)
    assert np.ptp(ground, axis=-1).max() == 0 and ground.min() > 140
    before, after = np.asarray(image).mean(-1).ravel(), ground[..., 0].ravel()
    assert np.corrcoef(before, after)[0, 1] > 0.999 and 0.3 < np.ptp(after) / np.ptp(before) < 0.4


@pytest.mark.parametrize("brightness", [20, 128, 235])
def test_heavy_tails_do_not_make_signed_maps_pale(brightness: int) -> None:
    """Pixels as strong as the bulk's upper half are coloured, though one is hundred times stronger than all others."""
    draw = np.random.default_rng(0)
    heat = draw.choice([-1.0, 1.0], (64, 64)) * draw.random((64, 64))
    heat[5, 5] = 100.0
    image = Image.new("RGB", (64, 64), (brightness,) * 3)
    pixels = np.asarray(overlay(image, heat, signed=True)).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[(heat > 0.5) & (heat <= 1)].min() > 100 and redness[heat < -0.5].max() < -100
    assert redness[5, 5] == redness.max()


def test_range_of_pictures() -> None:
    draw = np.random.default_rng(0)
    few = draw.standard_normal((9, 11))
    few[0, 0] = 50.0
    assert picture_range([few], signed=True) == (-50.0, 50.0)  # less than 100 tokens: none is beyond
    many = draw.standard_normal((64, 64))
    many[0, :40] = 10.0
    low, high = picture_range([many], signed=True)
    assert low == -high and high < 5 and (np.abs(many) > high).sum() == 40
    assert picture_range([many], signed=False) == (many.min(), 10.0)
    lone = 1e-6 * draw.standard_normal((64, 64))
    lone[0, :4] = -3.0
    assert picture_range([lone], signed=True) == (-3.0, 3.0)  # nearly all of it, not a tail
    assert picture_range([few, lone], signed=True) == picture_range([np.append(few, lone)], signed=True)
    assert picture_range([np.zeros((3, 3))], signed=True) == (0.0, 0.0)
    assert shown_range(many, (low, high), signed=True) == f"±{shown(high)} and beyond"
    assert shown_range(few, (-50.0, 50.0), signed=True) == "±50"
    assert shown_range(few, (-2.0, 50.0), signed=False) == "−2 … 50"


def test_overlay_is_red_where_the_map_is_hot() -> None:
    heat = torch.zeros(4, 8)
    heat[1, 6] = 2.0  # of 5 x 5 pixels per entry: rows 5 to 9, columns 30 to 34
    pixels = np.asarray(overlay(GREY, heat)).astype(int)
    assert pixels.shape == (20, 40, 3)
    red, green, blue = pixels[7, 32]
    assert red > 150 and green < 80 and blue < 80
    assert np.array_equal(pixels[:, :20], np.asarray(GREY)[:, :20])  # the cold side is the image itself
    redness = pixels[..., 0] - pixels[..., 1:].mean(-1)
    row, column = np.unravel_index(redness.argmax(), redness.shape)
    assert 5 <= row <= 9 and 30 <= column <= 34


def test_signed_overlay_is_red_above_and_blue_below_zero() -> None:
    heat = np.zeros((4, 8))
    heat[1, 1], heat[1, 6] = 1.0, -1.0
    pixels = np.asarray(overlay(GREY, heat, signed=True)).astype(int)
    assert pixels[7, 7, 0] > 200 and pixels[7, 7, 2] < 50
    assert pixels[7, 32, 2] > 200 and pixels[7, 32, 0] < 50
    assert np.ptp(pixels[17, 20]) == 0


def test_maps_are_normalised_on_their_own() -> None:
    heat = np.random.default_rng(0).random((4, 8))
    assert np.array_equal(np.asarray(overlay(GREY, heat)), np.asarray(overlay(GREY, 1e-6 * heat)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float) -> None:
    heat = np.zeros((2, 3))
    heat[0, 1] = bad
    with pytest.raises(NonFiniteError, match="map: expected finite numbers, got 1 NaN or infinite of 6"):
        overlay(GREY, heat)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (0, 4)])
def test_not_a_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"map: expected shape [h, w], got {list(shape)}")):
        overlay(GREY, np.zeros(shape))


def test_panel_keeps_pixels_and_draws_titles() -> None:
    colours = ("red", "lime", "blue")
    tiles = [(f"a ${i}_$", Image.new("RGB", (50, 40), colour)) for i, colour in enumerate(colours)]
    drawn = np.asarray(panel(tiles, columns=2, gap=8))
    assert drawn.shape == (8 + 2 * (19 + 40 + 8), 8 + 2 * (50 + 8), 3)
    assert (drawn[8 + 19 : 8 + 19 + 40, 8:58] == (255, 0, 0)).all()
    assert (drawn[8 + 19 : 8 + 19 + 40, 66:116] == (0, 255, 0)).all()
    assert (drawn[75 + 19 : 75 + 59, 8:58] == (0, 0, 255)).all()
    assert drawn[8:27, 8:58].min() < 100 and drawn[75:94, 66:].min() == 255  # a title; none where no tile is


def test_panel_breaks_long_titles_and_takes_any_letter() -> None:
    tile = Image.new("RGB", (100, 10), "red")
    one, three = panel([("short", tile)]), panel([("a title of many words that needs three lines", tile)])
    assert three.height - one.height >= 2 * 19
    panel([("\u732b \U0001f408", tile)], heading="heading")


def test_panel_refuses_nothing() -> None:
    with pytest.raises(OptionError, match="panel: expected at least one tile, got none"):
        panel([])
    with pytest.raises(OptionError, match="panel: expected at least one column, got 0"):
        panel([("", GREY)], columns=0)


def test_pyplot_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    assert panel([("title", overlay(GREY, np.eye(4)))]).width >= GREY.width


def test_enlarge() -> None:
    assert enlarge(GREY, 100).size == (100, 50)
    assert enlarge(GREY, 10) is GREY


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = "pictures need matplotlib, which is not installed; install it with: pip install 'relprop[images]'"
    with pytest.raises(MissingDependencyError, match=re.escape(text)):
        overlay(GREY, np.eye(2))


class TestSave:
    def test_replaces_and_leaves_no_part(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_text("old")
        save_png(GREY, path)
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
        with Image.open(path) as stored:
            assert stored.size == GREY.size

    def test_an_interrupted_write_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.png"
        path.write_text("old")

        def interrupted(self: Image.Image, target: Path, **options: object) -> None:
            target.write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_png(GREY, path)
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_text() == "old"

    def test_no_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "no" / "a.png"
        with pytest.raises(
            OutputError, match=re.escape(f"{path}: expected to write a picture, got the fault: No such")
        ):
            save_png(GREY, path)
