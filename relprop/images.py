"""Files in and out: images, weights and the output folder, each with an error that says what is wrong with it."""

from __future__ import annotations

import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from relprop.errors import ImageError, OutputError, WeightsError

__all__ = ["SUFFIXES", "find_images", "load_image", "load_weights", "prepare_output", "write_whole"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_OPENINGS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"\x80", "a Python pickle, as older versions of torch.save write it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"<", "a web page or XML"),
)


def find_images(paths: Iterable[str | Path], *, skip: str | Path | None = None) -> list[Path]:
    """Image files named by files and folders, folders searched with all that is below them, in a stable order.

    Args:
        paths: files are taken as they are, existing or not; of folders, files that end in one of `SUFFIXES`, in any
            case, and do not start with a dot.
        skip: a folder left out of the search below another one, such as the output folder.
    Returns:
        each file once, even if named twice.
    Raises:
        ImageError: a folder holds no image or cannot be read.
    """
    left_out = None if skip is None else Path(skip).resolve()
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        for file in _below(path, left_out) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _below(folder: Path, skip: Path | None) -> list[Path]:
    def stop(error: OSError) -> None:
        raise ImageError(f"{error.filename}: expected a readable folder, got {error.strerror}") from error

    files = []
    for name, folders, names in os.walk(folder, onerror=stop):
        here = Path(name)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (here / f).resolve() != skip)
        files += [here / n for n in sorted(names) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not files:
        raise ImageError(f"{folder}: expected a folder with images ({', '.join(SUFFIXES)}), got one without any")
    return files


def load_image(path: str | Path) -> Image.Image:
    """An image file as RGB, upright (EXIF orientation applied), 8 bits per channel, transparency laid over white.

    Args:
        path: any format that PIL reads; of an animation the first frame.
    Returns:
        PIL image of mode RGB, its pixels in memory.
    Raises:
        ImageError: missing, unreadable, not an image, truncated, without pixels, or larger than
            PIL.Image.MAX_IMAGE_PIXELS, the limit against files that unpack to more than memory holds.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path}: expected an image file, got a folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as stored:
                stored.load()
                return _as_rgb(ImageOps.exif_transpose(stored))
    except FileNotFoundError:
        raise ImageError(f"{path}: expected an image file, got no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageError(
            f"{path}: expected at most {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS), got more: {error}"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: expected an image, got {_not_an_image(path)}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{path}: expected a readable, complete image, got a file with the fault: {reason}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would cut values above 255 off
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _not_an_image(path: Path) -> str:
    opening = _opening(path)
    if not opening:
        return "an empty file"
    return f"a file of unknown format or without pixels, which begins with {opening[:8]!r}"


def _opening(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(32)


def prepare_output(path: str | Path) -> Path:
    """A folder to write to, made with its parents where it does not exist.

    Raises:
        OutputError: it is a file, lies below one, or cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        file = next(p for p in (folder, *folder.parents) if p.exists() and not p.is_dir())
        raise OutputError(f"{folder}: expected a folder to write to, got {file}, which is a file") from None
    except OSError as error:
        raise OutputError(f"{folder}: expected a folder to write to, got the fault: {error.strerror}") from error
    return folder


def write_whole(path: str | Path, write: Callable[[Path], object], what: str) -> Path:
    """Write a file so that it is either whole or not there: beside it first, then renamed.

    Args:
        write: writes to the path that it is given.
        what: the file is, for the error.
    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            write(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: expected to write {what}, got the fault: {reason}") from error
    return path


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Pickles are refused: reading one can run any code.

    Raises:
        WeightsError: missing, a folder, unreadable, or not a complete safetensors file; says what it looks like.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: expected a safetensors file, got no such file")
    if path.is_dir():
        raise WeightsError(f"{path}: expected a safetensors file, got a folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: expected a safetensors file, got {_looks_like(path, error)}") from error
    except OSError as error:
        raise WeightsError(f"{path}: expected a readable safetensors file, got the fault: {error}") from error


def _looks_like(path: Path, error: Exception) -> str:
    opening = _opening(path)
    if not opening:
        return "an empty file"
    if opening[8:9] == b"{":  # eight bytes of length, then JSON: it is one
        return f"a damaged or incomplete one: {error}"
    for start, meaning in _OPENINGS:
        if opening.startswith(start):
            advice = "; store its tensors with safetensors.torch.save_file" if "torch.save" in meaning else ""
            return f"{meaning}{advice}"
    return f"a file that begins with {opening[:8]!r}: {error}"
