"""What is derived from weights, made by one stream of a GPU and read by others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relprop import weights


class Stream:
    """Notes what it waits for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def record_event(self) -> Any:
        return ("made by", self)

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def test_other_streams_wait_for_the_one_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, reader, kept = Stream(), Stream(), []
    at: dict[str, Any] = {"stream": maker, "recording": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: at["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: at["recording"])
    tensor: Any = SimpleNamespace(device="cuda:0", record_stream=kept.append)
    made = weights._Ready(tensor)
    made.awaited(tensor)
    assert not maker.waited and not kept
    at.update(stream=reader, recording=True)  # which waited when it warmed up, and may not wait for others' events
    made.awaited(tensor)
    assert not reader.waited and not kept
    at.update(recording=False)
    made.awaited(tensor)
    assert reader.waited == [("made by", maker)] and kept == [reader]
