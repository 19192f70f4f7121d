"""One contender on one point: its proof, its first answer with the memory that took, and runs to be timed."""

from __future__ import annotations

import ctypes
import gc
import resource
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import relprop
from benchmarks.peers.cases import Case, proof_of
from benchmarks.peers.contenders import CONTENDERS, Options
from benchmarks.peers.packages import Answer, CannotExplain
from benchmarks.peers.proofs import usable
from benchmarks.peers.timed import Refused, compare, ends, out_of_memory
from benchmarks.timing import seconds_of


class Contestant:
    """A contender that was prepared for a case.

    Args:
        name: of CONTENDERS. case: on the CPU; its numbers are moved to the device that `options` name.
    Attributes:
        answers: first and last sample of the first run's answer and of the latest's. [1 or 2, ...] each
    Raises:
        CannotExplain: it has no answer for such a model. Refused: a check failed.
    """

    def __init__(self, name: str, case: Case, options: Options, proved: str = "") -> None:
        self.contender, self.options = CONTENDERS[name], options
        self.proof = proved or self._prove(case)
        self.case = case if options.device == "cpu" else case.to(case.inputs.dtype, options.device)
        self.run: Answer = self.contender.make(self.case, options)

    def _prove(self, case: Case) -> str:
        cut = proof_of(case.point)
        low = cut.to(case.inputs.dtype, self.options.device)
        proofs = self.contender.prove(self.contender.make, cut, low, self.options)
        wrong = [str(proof) for proof in proofs if not proof.passed]
        if wrong:
            raise Refused(f"wrong answer: {'; '.join(wrong)}")
        return "; ".join(map(str, proofs))

    def first(self) -> dict[str, float]:
        """The first run's seconds, and bytes that it and a second one took at their peak beyond what was there, and the
        process's peak. The second call of a small shape is where relprop records it.

        Raises:
            Refused: the answer cannot be one.
        """
        before = _rest(self.case, self.options.device)
        found: list[torch.Tensor] = []
        seconds = seconds_of(lambda: found.append(self.run()), self.options.device)
        self.run()
        peak, whole = _peak(self.options.device)
        why = usable(found[0].detach().float().cpu(), len(self.case.inputs))
        if why:
            raise Refused(f"wrong answer: {why}")
        self.answers = [ends(found[0])]
        return {
            "seconds": seconds,
            "peak_bytes": peak - before,
            "process_bytes": whole,
            "held_bytes": _own(self.options.device),
        }

    def again(self) -> float:
        """Seconds of one more run."""
        found: list[torch.Tensor] = []
        seconds = seconds_of(lambda: found.append(self.run()), self.options.device)
        self.answers[1:] = [ends(found[0])]
        return seconds


def serve(pipe: Connection, name: str, folder: Path, options: Options, threads: int, proved: str) -> None:
    """A process's work: prepare, answer once, run whenever asked to, and leave its answers when told to end.

    Messages are (kind, content).
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        _limit(options.memory, options.device)
        case = torch.load(folder / "case.pt", weights_only=False, mmap=True)
        contestant = Contestant(name, case, options, proved)
        pipe.send(("proved", contestant.proof))
        pipe.send(("first", contestant.first()))
        while pipe.recv():
            pipe.send(("ran", contestant.again()))
        torch.save(contestant.answers, _answers(folder, name))
        pipe.send(("left", None))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as problem:
        pipe.send(("failed", reason(problem, options)))


def examine(pipe: Connection, name: str, folder: Path, options: Options, threads: int) -> None:
    """Another process's work: hold the answers that `serve` left to their truth."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        _limit(options.memory)
        case = torch.load(folder / "case.pt", weights_only=False, mmap=True)
        pipe.send(("compared", compare(name, case, torch.load(_answers(folder, name)), options, folder)))
    except (BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as problem:
        pipe.send(("failed", reason(problem, options)))


def _answers(folder: Path, name: str) -> Path:
    return folder / f"answers of {name}.pt"


def reason(problem: Exception, options: Options) -> str:
    """Why there is no time, in one line."""
    if isinstance(problem, CannotExplain):
        return f"cannot explain: {problem}"
    if isinstance(problem, Refused):
        return str(problem)
    text = " ".join(str(problem).split())
    if out_of_memory(problem):
        if options.device == "cuda" and _attainable() < options.memory * 2**30:
            return f"the device's memory was full before the budget of {options.memory:g} GiB was: {text}"[:300]
        return f"over the memory budget of {options.memory:g} GiB"
    return f"{type(problem).__name__}: {text}"[:300]


def _attainable() -> int:
    """Bytes of the GPU that this process has or could still get."""
    return torch.cuda.memory_reserved() + torch.cuda.mem_get_info()[0]


def _limit(gib: float, device: str = "cpu") -> None:
    """What this process may allocate beyond what it has; an allocation over it fails as one without memory does."""
    if device == "cuda":
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))
        return
    limit = _status("VmData") + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _rest(case: Case, device: str) -> int:
    """Read all weights, give back what is not needed, and forget the peak so far; bytes that stay."""
    with torch.no_grad():
        sum(float(parameter.sum()) for parameter in case.model.parameters())
    gc.collect()
    relprop.empty_cache()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident()


def _peak(device: str) -> tuple[int, int]:
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return _status("VmHWM"), _status("VmHWM")


def _resident() -> int:
    return _status("VmRSS")


def _own(device: str) -> int:
    """Bytes that the process keeps from others: of the GPU, or of memory, pages that several share counted in parts."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return _resident()


def _status(field: str) -> int:
    """Bytes, as the kernel books them for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: expected {field}")
