"""What it costs to explain every token that a decoder wrote: targets that share a pass, and sequences cut at the last.

A Llama-shaped decoder of 4 layers with random weights, float32, method attnlrp. Run:

    python -m benchmarks.generation
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import relprop
from benchmarks.numerics.rows import RESULTS, write_rows
from relprop import memory
from relprop.native.tensors import fresh_results

ROUNDS = 2
CASES = ((16, 112), (240, 16))  # tokens of the prompt, generated tokens
TOGETHER = 16


def llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.LlamaForCausalLM(config).eval()


def uncut(model: nn.Module, ids: Tensor, prompt: int) -> None:
    """Every pass over the whole sequence and all of its logits."""
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    engine = relprop.compile(model, (), given, method="attnlrp")
    for start in range(prompt, ids.shape[1], TOGETHER):
        places = torch.arange(start, min(start + TOGETHER, ids.shape[1]))
        engine(**given, target=torch.stack([places - 1, ids[0, places]], -1)[None])


def measured(run: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds and peak MB of what a run allocates."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    with fresh_results(), memory.Allocations() as counted:
        run()
    return statistics.median(times), max(counted.history) / 1e6


def main() -> None:
    """Measure and write the rows."""
    model, rows = llama(), []
    for prompt, generated in CASES:
        ids = torch.randint(0, 8192, (1, prompt + generated), generator=torch.Generator().manual_seed(0))

        def explained(size: int | str, ids: Tensor = ids, prompt: int = prompt) -> relprop.Generation:
            return relprop.explain_generation(model, ids[:, :prompt], ids, targets_at_a_time=size)

        ways: dict[str, Callable[[], Any]] = {
            f"{TOGETHER} targets a pass, sequence cut": lambda run=explained: run(TOGETHER),
            f"{TOGETHER} targets a pass, whole sequence": lambda ids=ids, prompt=prompt: uncut(model, ids, prompt),
            "1 target a pass, sequence cut": lambda run=explained: run(1),
        }
        predicted = explained("auto").memory
        for way, run in ways.items():
            seconds, peak = measured(run)
            known = predicted if way.startswith(f"{TOGETHER}") and way.endswith("cut") else None
            rows.append(
                {
                    "prompt": prompt,
                    "generated": generated,
                    "way": way,
                    "seconds": seconds,
                    "peak_mb": peak,
                    "predicted_mb": "" if known is None else known / 1e6,
                }
            )
            print(rows[-1], flush=True)
    write_rows(RESULTS / "generation.csv", rows)


if __name__ == "__main__":
    main()
