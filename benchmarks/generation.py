"""What it costs to explain every token that a decoder wrote: targets that share a pass, and sequences cut at the last.

Llama-shaped decoders with random weights, method attnlrp: a small one in float32 in three ways, and one of 1.2 billion
weights in bfloat16 with precision "medium", whose passes are held to 8 GB beside the weights. Run:

    python -m benchmarks.generation [--only small | 1B]

The larger one takes most of an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import relprop
from benchmarks.cost_model import LLAMA
from benchmarks.numerics.rows import RESULTS, read_rows, write_rows
from relprop import memory
from relprop.native.tensors import fresh_results

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPES: dict[str, dict[str, int]] = {"small": SMALL, "1B": {**LLAMA, "head_dim": 64}}
DTYPES = {"small": torch.float32, "1B": torch.bfloat16}
ROUNDS = 2
CASES = ((16, 112), (240, 16))  # tokens of the prompt, generated tokens; of the small model
LARGE_CASE = (1000, 64)
LARGE_LIMIT = 8_000_000_000  # bytes that the large model's passes may take, its packed weights among them
TOGETHER = 16


def llama(shape: str) -> nn.Module:
    """With random weights; input and output embeddings are one, as in Llama 3.2 1B."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape]).eval()


def tokens(shape: str, count: int) -> Tensor:
    """A text of random tokens. [1, count]"""
    return torch.randint(0, SHAPES[shape]["vocab_size"], (1, count), generator=torch.Generator().manual_seed(0))


def uncut(model: nn.Module, ids: Tensor, prompt: int) -> None:
    """Every pass over the whole sequence and all of its logits."""
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    engine = relprop.compile(model, (), given, method="attnlrp")
    for start in range(prompt, ids.shape[1], TOGETHER):
        places = torch.arange(start, min(start + TOGETHER, ids.shape[1]))
        engine(**given, target=torch.stack([places - 1, ids[0, places]], -1)[None])


def resident() -> tuple[float, float]:
    """MB of this process in memory: now, and at most since `forget_resident`; NaN where /proc does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return float("nan"), float("nan")
    now, most = (float(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_resident() -> None:
    """Count the process's largest memory from now on."""
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")


def counted(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds, seconds of all cores, and peak MB of what one run allocates, by torch and by the system."""
    forget_resident()
    before, _ = resident()
    start, cores = time.perf_counter(), time.process_time()
    with fresh_results(), memory.Allocations() as made:
        run()
    spent = {"seconds": time.perf_counter() - start, "core_seconds": time.process_time() - cores}
    return {**spent, "peak_mb": max(made.history) / 1e6, "resident_mb": resident()[1] - before}


def repeated(run: Callable[[], Any]) -> dict[str, float]:
    """The same as medians, times without the counting."""
    run()
    times, cores = [], []
    for _ in range(ROUNDS):
        start, core = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - start)
        cores.append(time.process_time() - core)
    return {**counted(run), "seconds": statistics.median(times), "core_seconds": statistics.median(cores)}


def small() -> Iterator[dict[str, Any]]:
    """Three ways for the small model."""
    model = llama("small")
    for prompt, generated in CASES:
        ids = tokens("small", prompt + generated)

        def explained(size: int | str, ids: Tensor = ids, prompt: int = prompt) -> relprop.Generation:
            return relprop.explain_generation(model, ids[:, :prompt], ids, targets_at_a_time=size)

        ways: dict[str, Callable[[], Any]] = {
            f"{TOGETHER} targets a pass, sequence cut": lambda run=explained: run(TOGETHER),
            f"{TOGETHER} targets a pass, whole sequence": lambda ids=ids, prompt=prompt: uncut(model, ids, prompt),
            "1 target a pass, sequence cut": lambda run=explained: run(1),
        }
        predicted = explained("auto").memory
        for way, run in ways.items():
            known = predicted if way.startswith(f"{TOGETHER}") and way.endswith("cut") else None
            yield row("small", (prompt, generated), way, repeated(run), known)


def large() -> Iterator[dict[str, Any]]:
    """One run of the large model: a pass is probed, and as many targets share one as the limit allows."""
    model, (prompt, generated) = llama("1B"), LARGE_CASE
    ids = tokens("1B", prompt + generated)
    found: list[relprop.Generation] = []

    def run() -> None:
        given = {"memory_limit": LARGE_LIMIT, "precision": "medium"}
        found.append(relprop.explain_generation(model, ids[:, :prompt], ids, **given))

    spent = counted(run)
    together = found[0].targets_at_a_time
    way = f"{together} targets a pass (probed, at most {LARGE_LIMIT / 1e9:.0f} GB), sequence cut"
    yield row("1B", LARGE_CASE, way, spent, found[0].memory)


def row(shape: str, case: tuple[int, int], way: str, spent: dict[str, float], predicted: int | None) -> dict[str, Any]:
    """One row of the file."""
    dtype = str(DTYPES[shape]).removeprefix("torch.")
    head = {"model": shape, "dtype": dtype, "prompt": case[0], "generated": case[1], "way": way}
    return {**head, **spent, "predicted_mb": "" if predicted is None else predicted / 1e6}


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(SHAPES), help="this model anew; rows of the other stay")
    options = parser.parse_args()
    path, rows = RESULTS / "generation.csv", []
    kept = [old for old in read_rows(path) if old["model"] != options.only] if options.only and path.is_file() else []
    for shape, measure in (("small", small), ("1B", large)):
        if options.only in (None, shape):
            for found in measure():
                rows.append(found)
                print(found, flush=True)
                write_rows(path, rows, kept)


if __name__ == "__main__":
    main()
