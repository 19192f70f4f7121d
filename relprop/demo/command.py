"""What the demo's commands have in common: pictures into a folder, their paths on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from relprop.cli import guarded


def draw_into_folder(
    draw: Callable[[Path], Iterable[Path]], arguments: Sequence[str] | None, *, prog: str, says: str, out: str
) -> int:
    """Parse a command line, draw, and return the exit status.

    Args:
        draw: from a folder to the pictures written there.
        arguments: the command line; the process's own where None.
        prog, says: name and description, for --help.
        out: the folder where none is given.
    """
    parser = argparse.ArgumentParser(prog=prog, description=says)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the pictures; %(default)s")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    options = parser.parse_args(arguments)

    def run() -> int:
        for path in draw(options.out):
            print(path)
        return 0

    return guarded(run, debug=options.debug)
