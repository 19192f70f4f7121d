"""Pages in a real browser, without a window: its pixels, and the text that it would copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb"),
)


def _run(*arguments: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def screenshot(page: Path, *, dark: bool = False, size: tuple[int, int] = (900, 500)) -> NDArray[np.int64]:
    """A page's pixels. dark: whether the system prefers dark pages. [height, width, 3]"""
    out = page.with_name(f"{page.stem}-{'dark' if dark else 'light'}.png")
    prefers = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(prefers, f"--screenshot={out}", f"--window-size={size[0]},{size[1]}", page.as_uri())
    with Image.open(out) as stored:
        return np.asarray(stored.convert("RGB")).astype(np.int64)


def copied(page: Path) -> str:
    """What selecting all of a page and copying it gives."""
    probe = page.with_name(f"{page.stem}-probe.html")
    script = (
        "<script>const s=getSelection();s.selectAllChildren(document.body);"
        "const p=document.createElement('pre');p.id='copied';p.textContent=s.toString();"
        "document.body.append(p)</script></body>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    found = re.search(r'<pre id="copied">(.*?)</pre>', _run("--dump-dom", probe.as_uri()), re.DOTALL)
    assert found is not None
    return unescape(found[1])


def share_near(pixels: NDArray[np.int64], colour: tuple[int, int, int], reach: int = 3) -> float:
    """The share of pixels within `reach` of a colour in every channel."""
    return float((np.abs(pixels - np.asarray(colour)) <= reach).all(-1).mean())
