"""HTML that stands alone: one style sheet, pictures inside as data, no script and no address of anything else."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path

from PIL import Image

from relprop.errors import OptionError
from relprop.images import write_whole
from relprop.pictures.colours import DARK, LIGHT, Theme

THEMES = ("auto", "light", "dark")


def _variables(theme: Theme) -> str:
    colours = {name: getattr(theme, name) for name in ("page", "ink", "quiet", "positive", "negative")}
    listed = "".join(f"--{name}:{red} {green} {blue};" for name, (red, green, blue) in colours.items())
    return f"{listed}--strongest:{theme.strongest}"


STYLE = f"""
.relprop{{{_variables(LIGHT)};color-scheme:light;background:rgb(var(--page));color:rgb(var(--ink));
font:16px/1.7 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;padding:.8em 1em}}
.relprop.dark{{{_variables(DARK)};color-scheme:dark}}
@media(prefers-color-scheme:dark){{.relprop.auto{{{_variables(DARK)};color-scheme:dark}}}}
.relprop figure{{margin:0 0 1.1em}}
.relprop figcaption{{display:flex;flex-wrap:wrap;gap:.2em 1.2em;justify-content:space-between;align-items:center;
font-weight:600;margin-bottom:.15em}}
.relprop .text{{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-width:46em}}
.relprop .text span,.relprop .matrix td{{--share:0}}
.relprop .p{{background:rgb(var(--positive)/calc(var(--share)*var(--strongest)))}}
.relprop .n{{background:rgb(var(--negative)/calc(var(--share)*var(--strongest)))}}
.relprop .text span{{border-radius:.2em;padding:.1em 0}}
.relprop .text .against{{text-decoration:underline dotted 1px;text-underline-offset:.25em}}
.relprop .special{{color:rgb(var(--quiet));font-size:.8em}}
.relprop .text .special.p,.relprop .text .special.n{{color:inherit}}
.relprop .break::before{{content:"↵";color:rgb(var(--quiet))}}
.relprop .legend{{display:inline-flex;gap:.5em;align-items:center;font-weight:400;font-size:.8em;
color:rgb(var(--quiet));white-space:nowrap;user-select:none}}
.relprop .bar{{width:9em;height:.8em;border-radius:.2em;border:1px solid rgb(var(--quiet)/.4)}}
.relprop .bar.signed{{background:linear-gradient(to right,rgb(var(--negative)/var(--strongest)),
rgb(var(--negative)/0) 50%,rgb(var(--positive)/0) 50%,rgb(var(--positive)/var(--strongest)))}}
.relprop .bar.unsigned{{background:linear-gradient(to right,rgb(var(--positive)/0),
rgb(var(--positive)/var(--strongest)))}}
.relprop img{{max-width:100%;height:auto}}
.relprop .scroll{{overflow-x:auto}}
.relprop .matrix{{border-collapse:collapse;font-size:.8em;line-height:1.2}}
.relprop .matrix th{{font-weight:400;padding:.2em .45em;white-space:pre}}
.relprop .matrix thead th{{vertical-align:bottom;height:1px}}
.relprop .matrix thead th span{{writing-mode:vertical-rl;transform:rotate(180deg);white-space:pre}}
.relprop .matrix tbody th{{text-align:right}}
.relprop .matrix td{{min-width:1.9em;height:1.9em;padding:0;border:1px solid rgb(var(--quiet)/.18)}}
.relprop .matrix td.corner{{border-color:transparent}}
.relprop .cells{{--strongest:1}}
.relprop .matrix td.none{{background:rgb(var(--quiet)/.1);border-color:transparent}}
"""


_STYLE_TAG = f"<style>{STYLE}</style>"


def check_theme(theme: str) -> None:
    """Raises:
    OptionError: not one of `THEMES`.
    """
    if theme not in THEMES:
        raise OptionError(f"theme: expected one of {', '.join(THEMES)}, got {theme!r}")


def fragment(body: str, theme: str = "auto") -> str:
    """HTML that can stand in any page, style included.

    Args:
        theme: "auto" follows what the reader's system prefers.
    Raises:
        OptionError: the theme.
    """
    check_theme(theme)
    return f'<div class="relprop {theme}">{_STYLE_TAG}\n{body}\n</div>'


def page(body: str, title: str, theme: str = "auto", style: str = "") -> str:
    """A whole page around fragments, which share its style sheet. style: rules besides `STYLE`."""
    check_theme(theme)
    scheme = {"auto": "light dark", "light": "light", "dark": "dark"}[theme]
    return (
        f'<!doctype html>\n<html lang="en" class="relprop {theme}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="{scheme}"><title>{escape(title)}</title>'
        f"{_STYLE_TAG}<style>body{{margin:0 auto;max-width:72em}}{style}</style></head>\n"
        f"<body>\n{body.replace(_STYLE_TAG, '')}\n</body></html>\n"
    )


def legend(low: str, high: str, *, signed: bool) -> str:
    """A colour scale with its two ends."""
    kind = "signed" if signed else "unsigned"
    return (
        f'<span class="legend"><span>{escape(low)}</span><span class="bar {kind}" role="img"'
        f' aria-label="colour scale from {escape(low)} to {escape(high)}"></span><span>{escape(high)}</span></span>'
    )


def data_uri(image: Image.Image, format: str = "PNG") -> str:
    """An address that holds the image itself. format: "PNG", or "JPEG" for photographs."""
    stream = io.BytesIO()
    image.save(stream, format=format, optimize=True, quality=90)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def picture(draw: Callable[[bool], Image.Image] | Image.Image, alt: str, theme: str = "auto", *, scale: int = 1) -> str:
    """An <img>, or a <picture> with a version for each ground.

    Args:
        draw: the picture, or from whether the ground is dark to it.
        scale: pixels of the picture per pixel of the page.
    """

    def image(drawn: Image.Image) -> str:
        return f'<img src="{data_uri(drawn)}" alt="{escape(alt)}" width="{drawn.width // scale}">'

    if isinstance(draw, Image.Image):
        return image(draw)
    if theme != "auto":
        return image(draw(theme == "dark"))
    dark = data_uri(draw(True))
    return f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">{image(draw(False))}</picture>'


def save_text(text: str, path: str | Path) -> Path:
    """Write UTF-8 so that the file is either whole or not there.

    Raises:
        OutputError: it cannot be written.
    """
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), "a page")
