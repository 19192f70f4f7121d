"""What the command says: results on stdout, everything else on stderr, above a progress bar."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "conclude", "say"]


@dataclass
class Progress:
    """A bar of what is done, and the count of inputs that failed.

    Attributes:
        bar: of tqdm; None for none.
        failed: inputs that could not be explained.
    """

    bar: Any = None
    failed: int = 0

    def fail(self, name: object, error: Exception) -> None:
        """Report an input that cannot be explained; the others still are."""
        text = str(error)
        self.say(f"error: {text if text.startswith(str(name)) else f'{name}: {text}'}")
        self.failed += 1

    def done(self) -> None:
        """One more."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line on stderr."""
        say(text, self.bar)

    def print(self, text: str) -> None:
        """A line of results on stdout; letters that its encoding lacks are written as escapes."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        _line(text.encode(encoding, "backslashreplace").decode(encoding), self.bar, sys.stdout)


def conclude(failed: int, total: int) -> int:
    """The exit code, and how many failed."""
    if not failed:
        return 0
    say(f"{failed} of {total} could not be explained")
    return 1


def say(text: str, bar: Any = None) -> None:
    """A line on stderr, above the progress bar."""
    _line(f"relprop: {text}", bar, sys.stderr)


def _line(text: str, bar: Any, stream: Any) -> None:
    if bar is None:
        print(text, file=stream)
    else:
        bar.write(text, file=stream)
