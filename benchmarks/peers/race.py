"""Contenders of one point, each in a fresh process, in turn.

Processes of a heat stay alive together and run one at a time, round after round, the plain forward pass first. A heat
is closed when its processes hold half of the memory budget; the next one begins with a forward pass of its own. When it
is closed, the answers that were timed are held to their truth, in a process that no time and no memory is taken of.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.peers.cases import Point, case_of
from benchmarks.peers.child import examine, serve
from benchmarks.peers.contenders import CONTENDERS, Options, version
from benchmarks.peers.timed import NOT_COMPARED
from benchmarks.timing import spread

SETTLING = 8.0  # preparing may take this many times the budget of the runs: capture, compilation, the check
COLUMNS = (
    *("ms_median", "ms_p20", "ms_p80", "ratio_to_forward", "ratio_p20", "ratio_p80", "ms_per_sample"),
    *("peak_bytes", "process_bytes", "rounds", "check", "error", "note", "version"),
)


class Out(Exception):
    """A contender has no time, or no more of it; the message says why."""


class Late(Out):
    """A process did not answer in time."""


class Entrant(Protocol):
    """A prepared contender: what it says of its check, its first run, and how it runs again."""

    proof: str
    first: dict[str, float]

    def again(self, budget: float) -> float:
        """Seconds of one more run, or Out."""
        ...

    def leave(self) -> None:
        """Leave the answers that were timed behind, or Out."""
        ...

    def close(self) -> None: ...

    def compared(self) -> str:
        """What the answers that it left were held to, or Out where they are wrong. When all are closed."""
        ...


Enter = Callable[[str, Point, Options, str], Entrant]


def context() -> ForkServerContext:
    """Processes forked from one that has imported everything and run nothing."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["benchmarks.peers.child", "torch._dynamo", "torch.export"])
    return found


class _Helper:
    """A process that sends messages (kind, content). Arguments: what it runs, and with what beside its pipe."""

    def __init__(self, work: Callable[..., None], *given: Any) -> None:
        here = context()
        self.pipe, theirs = here.Pipe()
        self.process = here.Process(target=work, args=(theirs, *given), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self, kind: str, seconds: float, what: str) -> Any:
        try:
            if not self.pipe.poll(seconds):
                raise Late(f"over the budget: did not {what} within {seconds:g} s")
            found, content = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise Out(f"its process ended with status {self.process.exitcode}") from None
        if found == "failed":
            raise Out(content)
        if found != kind:
            raise RuntimeError(f"expected {kind}, got {found}")
        return content

    def close(self) -> None:
        self.pipe.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str, folder: Path, options: Options, proved: str) -> None:
        self.options, self._given = options, (name, folder, options, torch.get_num_threads())
        self._helper = _Helper(serve, *self._given, proved)
        try:
            self.proof: str = self._helper.wait("proved", SETTLING * options.budget, "prepare")
            self.first: dict[str, float] = self._helper.wait("first", SETTLING * options.budget, "run once")
            if self.first["seconds"] > options.budget:
                raise Out(f"over the budget of {options.budget:g} s: {self.first['seconds']:.0f} s")
        except Out:
            self.close()
            raise

    def again(self, budget: float) -> float:
        self._helper.pipe.send(True)
        return self._helper.wait("ran", 4 * budget, "run again")

    def leave(self) -> None:
        self._helper.pipe.send(False)
        self._helper.wait("left", 4 * self.options.budget, "leave its answers")

    def close(self) -> None:
        self._helper.close()

    def compared(self) -> str:
        helper = _Helper(examine, *self._given)
        try:
            return helper.wait("compared", SETTLING * self.options.budget, "compute it in float64")
        except Late as problem:
            return f"{NOT_COMPARED}{problem}"
        finally:
            helper.close()


def compete(
    point: Point, names: Iterable[str], options: Options, enter: Enter | None = None, until: float = math.inf
) -> list[dict[str, Any]]:
    """Rows of every contender named; those without a time say why.

    Args:
        enter: what starts a contender; a process of its own by default.
        until: when the last may start, by `time.monotonic`; who comes later has no row.
    Raises:
        ValueError: the point's model or size. Out: the forward pass itself has no time.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        case = case_of(point)
        note = case.note
        torch.save(case, Path(folder) / "case.pt")
        del case
        start = enter or (lambda name, _, chosen, proved: Process(name, Path(folder), chosen, proved))
        results = _heats(point, [name for name in names if name != "forward"], options, start, until)
    return [_row(point, name, found, note) for name, found in results.items()]


def without_a_time(point: Point, problem: Out) -> list[dict[str, Any]]:
    """The one row of a point whose forward pass has no time."""
    return [_row(point, "forward", {"error": str(problem)}, "")]


def _heats(point: Point, names: list[str], options: Options, enter: Enter, until: float) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {"forward": {}}
    proved = ""
    while names or not results["forward"]:
        heat = {"forward": enter("forward", point, options, proved)}
        proved = heat["forward"].proof
        try:
            once = heat["forward"].again(options.budget)
            while names and _held(heat.values()) < options.memory * 2**29:
                if time.monotonic() > until:
                    print(f"  not started: {', '.join(names)}; the time of the whole run is over", flush=True)
                    names.clear()
                    break
                name = names.pop(0)
                try:
                    _expected(name, once, options)
                    heat[name] = enter(name, point, options, "")
                except Out as problem:
                    results[name] = {"error": str(problem)}
                    print(f"  {name}: {problem}", flush=True)
            found = {name: row for name, row in _rounds(heat, options).items() if not results.get(name)}
        finally:
            for entrant in heat.values():
                entrant.close()
        results.update({name: _compared(name, heat[name], row) for name, row in found.items()})
        if results["forward"].get("error"):
            raise Out(results["forward"]["error"])
    return results


def _compared(name: str, entrant: Entrant, found: dict[str, Any]) -> dict[str, Any]:
    """A row of results with the check of its timed answers, or without a time where they are wrong."""
    if "error" in found:
        return found
    try:
        return {**found, "check": f"{found['check']}; {entrant.compared()}"}
    except Out as problem:
        print(f"  {name}: {problem}", flush=True)
        return {"error": str(problem)}


def _held(entrants: Iterable[Entrant]) -> float:
    return sum(entrant.first["held_bytes"] for entrant in entrants)


def _expected(name: str, forward: float, options: Options) -> None:
    """Leave out what is known to take more than twice the budget."""
    passes = CONTENDERS[name].passes
    if passes * forward > 2 * options.budget:
        raise Out(
            f"over the budget of {options.budget:g} s: about {passes:g} forward passes of {forward:.2g} s, not started"
        )


def _rounds(heat: dict[str, Entrant], options: Options) -> dict[str, dict[str, Any]]:
    """Times of a heat: as many rounds of each as its budget has, the forward pass in every round."""
    counts = {name: _affordable(entrant.first["seconds"], options) for name, entrant in heat.items()}
    counts["forward"] = max(counts.values(), default=1) or 1
    times: dict[str, list[float]] = {name: [] for name in heat}
    problems: dict[str, str] = {}
    for turn in range(counts["forward"]):
        for name, entrant in heat.items():
            if turn < counts[name] and name not in problems:
                try:
                    times[name].append(entrant.again(options.budget))
                except Out as problem:
                    problems[name] = str(problem)
    for name, entrant in heat.items():
        if name not in problems:
            try:
                entrant.leave()
            except Out as problem:
                problems[name] = str(problem)
    if "forward" in problems:
        raise Out(problems["forward"])
    return {name: _measured(heat[name], times[name], times["forward"], problems.get(name, "")) for name in heat}


def _affordable(seconds: float, options: Options) -> int:
    return max(0, min(options.rounds, int(options.budget / seconds) - 1))


def _measured(entrant: Entrant, seconds: Sequence[float], forward: Sequence[float], problem: str) -> dict[str, Any]:
    if problem:
        return {"error": problem}
    note = "" if seconds else "its first run, as the budget has no other"
    found = list(seconds) or [entrant.first["seconds"]]
    passes = list(forward) if seconds else [statistics.median(forward)]
    return {
        **spread(found, passes),
        **{key: int(entrant.first[key]) for key in ("peak_bytes", "process_bytes")},
        "rounds": len(found),
        "check": entrant.proof,
        "note": note,
    }


def _row(point: Point, name: str, found: dict[str, Any], cut: str) -> dict[str, Any]:
    contender = CONTENDERS[name]
    notes = [contender.note, found.get("note", ""), cut]
    known = {**found, "note": "; ".join(filter(None, notes)), "version": version(contender)}
    if "ms_median" in found:
        known["ms_per_sample"] = round(found["ms_median"] / point.batch, 2)
    row = {"model": point.model, "batch": point.batch, "tokens": point.tokens, "dtype": point.dtype, "contender": name}
    return {**row, **{column: known.get(column, "") for column in COLUMNS}}
