from __future__ import annotations

import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from relprop.errors import ImageError, OutputError, WeightsError
from relprop.images import find_images, load_image, load_weights, prepare_output


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def fails(error: type[Exception], text: str) -> pytest.RaisesExc:
    return pytest.raises(error, match=re.escape(text))


class TestLoadImage:
    @pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp"])
    def test_lossless_formats_keep_every_pixel(self, tmp_path: Path, suffix: str) -> None:
        stored, path = picture(13, 7), tmp_path / f"a{suffix}"
        stored.save(path, **({"lossless": True} if suffix == ".webp" else {}))
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(stored))

    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        path, exif = tmp_path / "a.jpg", Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
        stored = Image.new("RGB", (32, 16), "black")
        stored.paste("white", (0, 0, 8, 16))
        stored.save(path, exif=exif, quality=100)
        upright = np.asarray(load_image(path))
        assert upright.shape == (32, 16, 3)
        assert upright[:8].min() > 240 and upright[8:].max() < 15

    def test_transparency_is_laid_over_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "rgba.png")
        palette = Image.new("P", (2, 2), 0)
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.save(tmp_path / "p.png", transparency=0)
        for name in ("rgba.png", "p.png"):
            assert np.asarray(load_image(tmp_path / name)).min() == 255

    @pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA"])
    def test_other_modes_become_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        picture(8, 8).convert(mode).save(path)
        loaded = load_image(path)
        assert loaded.mode == "RGB" and loaded.size == (8, 8)

    def test_sixteen_bits_are_scaled_not_cut_off(self, tmp_path: Path) -> None:
        values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_missing(self, tmp_path: Path) -> None:
        with fails(ImageError, f"{tmp_path / 'no.png'}: expected an image file, got no such file"):
            load_image(tmp_path / "no.png")

    def test_folder(self, tmp_path: Path) -> None:
        with fails(ImageError, f"{tmp_path}: expected an image file, got a folder"):
            load_image(tmp_path)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_truncated(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        picture(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:-900])
        with fails(ImageError, f"{path}: expected"):
            load_image(path)

    def test_truncated_jpeg_says_so(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        picture(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:-900])
        with fails(
            ImageError, f"{path}: expected a readable, complete image, got a file with the fault: image file is"
        ):
            load_image(path)

    def test_text_named_png(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_text("not a picture at all")
        text = "got a file of unknown format or without pixels, which begins with b'not a pi'"
        with fails(ImageError, f"{path}: expected an image, {text}"):
            load_image(path)

    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        with fails(ImageError, "expected an image, got an empty file"):
            load_image(tmp_path / "a.png")

    def test_without_pixels(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gif"
        Image.new("RGB", (4, 4)).save(path)
        whole = bytearray(path.read_bytes())
        frame = whole.index(b",")
        whole[6:10] = whole[frame + 5 : frame + 9] = bytes(4)  # width and height of the screen and of the frame
        path.write_bytes(whole)
        text = f"{path}: expected an image, got a file of unknown format or without pixels, which begins with b'GIF8"
        with fails(ImageError, text):
            load_image(path)

    @pytest.mark.parametrize("side", [12, 64])  # below and above twice the limit, where PIL warns and where it raises
    def test_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
        path = tmp_path / "a.png"
        picture(side, side).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        text = f"expected at most 100 pixels (PIL.Image.MAX_IMAGE_PIXELS), got more: Image size ({side * side} pixels)"
        with fails(ImageError, f"{path}: {text}"):
            load_image(path)


class TestFindImages:
    def test_folders_are_searched_and_nothing_is_named_twice(self, tmp_path: Path) -> None:
        for name in ("b/x.PNG", "a.jpg", "b/c/y.webp", "b/.hidden.png", ".git/z.png", "notes.txt", "b/d.jpeg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        found = find_images([tmp_path / "b" / "x.PNG", tmp_path, tmp_path / "b"])
        assert [str(path.relative_to(tmp_path)) for path in found] == ["b/x.PNG", "a.jpg", "b/d.jpeg", "b/c/y.webp"]

    def test_files_are_taken_as_they_are(self, tmp_path: Path) -> None:
        assert find_images([tmp_path / "a.tiff"]) == [tmp_path / "a.tiff"]

    def test_output_folder_is_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.png").touch()
        (tmp_path / "b.png").touch()
        assert find_images([tmp_path], skip=tmp_path / "out") == [tmp_path / "b.png"]

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        text = f"{tmp_path}: expected a folder with images (.jpg, .jpeg, .png, .webp), got one without any"
        with fails(ImageError, text):
            find_images([tmp_path])


class TestPrepareOutput:
    def test_makes_parents_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        folder = prepare_output(tmp_path / "a" / "b")
        assert stat.S_ISDIR(folder.stat().st_mode) and not list(folder.iterdir())
        assert prepare_output(folder) == folder

    @pytest.mark.parametrize("below", ["", "deeper/still"])
    def test_file_in_place_of_a_folder(self, tmp_path: Path, below: str) -> None:
        file = tmp_path / "file"
        file.touch()
        with fails(OutputError, f"{file / below}: expected a folder to write to, got {file}, which is a file"):
            prepare_output(file / below)

    def test_system_says_no(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with fails(OutputError, f"{tmp_path}: expected a folder to write to, got the fault: Permission denied"):
            prepare_output(tmp_path)


class TestLoadWeights:
    def test_round_trip(self, tmp_path: Path) -> None:
        save_file({"a": torch.arange(3.0)}, tmp_path / "w.safetensors")
        assert load_weights(tmp_path / "w.safetensors")["a"].tolist() == [0, 1, 2]

    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with fails(WeightsError, "no.safetensors: expected a safetensors file, got no such file"):
            load_weights(tmp_path / "no.safetensors")
        with fails(WeightsError, f"{tmp_path}: expected a safetensors file, got a folder"):
            load_weights(tmp_path)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "got an empty file"),
            (
                b"\x80\x02}q\x00.",
                "got a Python pickle, as older versions of torch.save write it; store its tensors with",
            ),
            (
                b"version https://git-lfs.github.com/spec/v1\n",
                "got a Git LFS pointer: the file itself was not downloaded",
            ),
            (b"<!DOCTYPE html><html></html>", "got a web page or XML"),
            (b"\x89HDF\r\n\x1a\n" + bytes(30), "got an HDF5 file"),
            (b"garbage that goes on and on", "got a file that begins with b'garbage ': "),
        ],
    )
    def test_other_files(self, tmp_path: Path, content: bytes, text: str) -> None:
        path = tmp_path / "w.safetensors"
        path.write_bytes(content)
        with fails(WeightsError, f"{path}: expected a safetensors file, {text}"):
            load_weights(path)

    def test_checkpoint_of_torch_save(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(2)}, tmp_path / "w.pt")
        text = "got a zip archive, as torch.save writes it; store its tensors with safetensors.torch.save_file"
        with fails(WeightsError, text):
            load_weights(tmp_path / "w.pt")

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        save_file({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-40])
        with fails(WeightsError, "expected a safetensors file, got a damaged or incomplete one: "):
            load_weights(path)
