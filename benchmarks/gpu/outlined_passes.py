"""What the session's engines launch, without running them: their passes on tensors that have no numbers.

Of every model a few layers, as the others launch the same, in every dtype, method and number of samples and targets
that a point of `end_to_end` or `steps` has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.contenders import engine_of, images, llama, token_ids, vit
from benchmarks.gpu.machine import Machine
from relprop.kernels.launch import Launch, recording
from relprop.torch_flags import exact_products
from relprop.weights import Derive

LAYERS = 3  # the first, the last, and all between
DTYPES = (torch.bfloat16, torch.float32)
METHODS = (("transformer_attribution", "chefer"), ("transformer_attribution", "chefer_stable"), ("attnlrp", "attnlrp"))
SAMPLES_AND_TARGETS = ((64, 1), (1, 1), (2, 1), (2, 2), (16, 1), (16, 2), (16, 4))
Pass = tuple[Any, Tensor, tuple[int, ...]]  # an engine, its input, the shape of an index of targets


def _images(machine: Machine) -> Iterator[Pass]:
    for dtype in DTYPES:
        model, one = vit(machine, dtype=dtype, depth=LAYERS), images(machine, 1, dtype=dtype)
        for method, composite in METHODS:
            engine = engine_of(machine, model, one, False, method=method, composite=composite)
            for samples, targets in SAMPLES_AND_TARGETS:
                yield engine, one.expand(samples, -1, -1, -1), (samples, targets, 1)


def _long(machine: Machine) -> Iterator[Pass]:
    one = images(machine, 1, 2048, torch.bfloat16)
    model = vit(machine, 2048, torch.bfloat16, depth=LAYERS)
    yield engine_of(machine, model, one, False), one, (1, 1, 1)


def _words(machine: Machine) -> Iterator[Pass]:
    options = {"use_cache": False, "logits_to_keep": 1}
    for dtype in DTYPES:
        model = llama(machine, LAYERS, dtype)
        for length in (machine.size(4096, 6), machine.size(256, 6)):
            ids = token_ids(machine, length)
            engine = engine_of(machine, model, ((ids,), options), False, method="attnlrp", output="logits")
            yield engine, ids, (1, 1, 2)


def launches(machine: Machine, architecture: int) -> Iterator[Launch]:
    """Pass by pass, as its steps run by themselves and as those of one kernel do.

    Args:
        architecture: compute capability, as 90 for 9.0.
    """
    for passes in (_images, _words, _long):
        for engine, given, index in passes(machine):
            alone = replace(engine.program, reverse=tuple(replace(step, fused=None) for step in engine.program.reverse))
            for program in (engine.program, alone):
                with recording(architecture) as recorded:
                    _run(engine, program, given, index)
                yield from (replace(launch, arguments=tuple(map(_outline, launch.arguments))) for launch in recorded)


def _run(engine: Any, program: Any, given: Tensor, index: tuple[int, ...]) -> None:
    function, _, lasting, _ = engine._parts()
    function.program = program
    with FakeTensorMode() as outlines, torch.no_grad(), exact_products():
        tensors = [outlines.from_tensor(tensor) for tensor in (given, *lasting())]
        function(tensors, torch.zeros(index, dtype=torch.int64, device=given.device), Derive())


def _outline(given: Any) -> Any:
    return torch.empty(given.shape, dtype=given.dtype, device="meta") if isinstance(given, Tensor) else given
