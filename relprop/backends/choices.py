"""Which backend runs an operation on a GPU, as measured; choices.json is made of rows by `benchmarks.gpu.choose`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from relprop.graph import Node
from relprop.rules import Rule

PATH = Path(__file__).with_name("choices.json")
Choices = dict[str, str]  # what `key` makes -> backend


def key(kind: str, rule: str, dtype: torch.dtype, batch: int) -> str:
    """An operation, its rule, the model's dtype and whether there are several samples, as the table has them.

    What is fastest for a batch in bfloat16 says little of one sample in float32.
    """
    return f"{kind} {rule} {str(dtype).removeprefix('torch.')} {'one' if batch == 1 else 'many'}"


def key_of(node: Node, rule: Rule, batch: int) -> str:
    """Of a step; the model's dtype is that of the step's output."""
    return key(node.kind, rule.name, node.outputs[0].dtype, batch)


@cache
def table() -> dict[str, Choices]:
    """What is committed, by compute capability."""
    found: dict[str, Choices] = json.loads(PATH.read_text())
    return found


def choices_for(device: torch.device) -> tuple[Choices, str]:
    """The fastest backend of every operation and rule on a device, and why there is none where it is empty."""
    capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    found = table().get(capability, {})
    if found:
        return found, ""
    return found, f"no kernel was timed on compute capability {capability}; ask for one by backend="


def fastest(rows: Iterable[dict[str, str]]) -> dict[str, Choices]:
    """The table of measured steps.

    Args:
        rows: with `capability`, `model`, `method`, `composite`, `kind`, `rules` (joined by " + "), `dtype`, `batch`,
            `backend` and `ms`. A step of several rules counts for each of them. A backend that some model or method
            could not be timed on is not chosen; rows of fused steps, which no other backend has, choose nothing.
    """
    times: dict[tuple[str, str], dict[str, dict[tuple[str, ...], float]]] = {}
    for row in rows:
        if row["fused"]:
            continue
        case, dtype = tuple(row[c] for c in ("model", "method", "composite", "rules")), getattr(torch, row["dtype"])
        for rule in row["rules"].split(" + "):
            named = key(row["kind"], rule, dtype, int(row["batch"]))
            by_backend = times.setdefault((row["capability"], named), {})
            of_case = by_backend.setdefault(row["backend"], {})
            of_case[case] = of_case.get(case, 0.0) + float(row["ms"])
    found: dict[str, Choices] = {}
    for (capability, named), by_backend in sorted(times.items()):
        cases = {case for of_case in by_backend.values() for case in of_case}
        whole = {name: sum(of_case.values()) for name, of_case in by_backend.items() if set(of_case) == cases}
        if whole:
            found.setdefault(capability, {})[named] = min(whole, key=lambda name: whole[name])
    return found
