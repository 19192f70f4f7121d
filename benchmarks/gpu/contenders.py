"""What is timed and compared on the device: models, engines, and other people's code."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import relprop
from benchmarks.gpu.machine import Machine, told
from benchmarks.numerics.reference import Reference
from relprop import native_cuda
from relprop.weights import derived_weights

Run = Callable[[], Any]
Key = tuple[str, ...]


def vit(machine: Machine, side: int = 224, dtype: torch.dtype = torch.float32, depth: int = 12) -> Any:
    """ViT-B/16 with random weights; a tiny one in a dry run."""
    torch.manual_seed(0)
    tiny = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = timm.models.VisionTransformer(**(tiny if machine.dry else {"img_size": side, "depth": depth})).eval()
    model.norm.eps = 1e-5  # as the reference's final norm has it
    return model.to(machine.device, dtype)


def images(machine: Machine, batch: int, side: int = 224, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    side = machine.size(side, 32)
    return machine.randn(batch, 3, side, side, dtype=dtype, seed=seed)


def llama(machine: Machine, layers: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama-shaped model, of 1.2 billion weights with 16 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32)
    if machine.dry:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=machine.size(8, 2),
        vocab_size=machine.size(128256, 50),
        head_dim=machine.size(64, 16),
    )
    torch.manual_seed(0)
    with torch.device(machine.device):
        return LlamaForCausalLM(config).eval().to(dtype)


def token_ids(machine: Machine, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, machine.size(128256, 50), (1, length), generator=generator).to(machine.device)


def compiled(machine: Machine, model: Any) -> Any:
    """Through torch.compile; as it is in a dry run."""
    return model if machine.dry else torch.compile(model)


def engine_of(machine: Machine, model: Any, example: Any, graph: bool = True, **options: Any) -> Any:
    """An engine on Triton kernels, recorded where there is a device to record on."""
    options = {"backend": "triton", "cuda_graph": graph and not machine.dry, **options}
    args, kwargs = example if isinstance(example, tuple) else ((example,), {})
    return relprop.compile(model, args, kwargs, **options)


def backends(machine: Machine) -> list[str]:
    """Those whose kernels run on the device."""
    cuda = native_cuda.available()[0] and native_cuda.device_type() == machine.device.type
    return ["triton", "cuda"] if cuda else ["triton"]


def key_of(
    family: str, method: str, composite: str, backend: str, graph: bool, dtype: torch.dtype, compiled: bool = False
) -> Key:
    """By which a timing finds its check among the rows of `parity`."""
    return family, method, composite, backend, str(graph), str(dtype).removeprefix("torch."), str(compiled)


def label_of(backend: str, name: str, graph: bool, compiled: bool = False) -> str:
    return f"relprop_{backend}_{name}{'_compiled' if compiled else ''}{'_graph' if graph else ''}"


def forward(model: Any, *args: Any, **kwargs: Any) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def forward_backward(model: Any, given: Tensor) -> Run:
    def run() -> None:
        leaf = given.clone().requires_grad_()
        model(leaf)[:, 5].sum().backward()

    return run


def of_embeddings(model: Any, plain: Any, ids: Tensor) -> Run:
    """One logit's gradient at the embeddings."""

    def run() -> Tensor:
        embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1, 7].backward()
        assert embedded.grad is not None
        return (embedded * embedded.grad).float().sum(-1)

    return run


def reference(base: Any, given: Tensor) -> Run:
    """The authors' code as it is, from the checkout at $REFERENCE."""
    checkout = os.environ.get("REFERENCE")
    if not checkout:
        raise FileNotFoundError("REFERENCE: expected a checkout of the authors' code, got none")
    theirs = Reference(Path(checkout), copy.deepcopy(base).cpu(), torch.float32)
    if given.device.type == "cpu":
        return lambda: theirs.explain(given, torch.tensor([5]), "transformer_attribution")
    theirs.generator.model.to(given.device)
    return lambda: theirs.generator.generate_LRP(given.clone().requires_grad_(), 5, method="transformer_attribution")


def lxt(model: Any, ids: Tensor) -> Run:
    """AttnLRP by LXT's patched modules ($LXT is a checkout), on the very model that the others ran on."""
    if os.environ.get("LXT"):
        sys.path.insert(0, os.environ["LXT"])
    from benchmarks.numerics.lxt import LxtText

    theirs = LxtText("llama").patched(model)
    return of_embeddings(theirs, theirs, ids)


@contextlib.contextmanager
def unpatched_after(module_name: str) -> Iterator[None]:
    """What is patched within it, names of a module and methods of its classes, is put back."""
    module = importlib.import_module(module_name)
    names = dict(vars(module))
    kinds = [kind for kind in names.values() if isinstance(kind, type) and kind.__module__ == module_name]
    methods = [(kind, dict(vars(kind))) for kind in (*kinds, nn.Dropout)]
    try:
        yield
    finally:
        for name in set(vars(module)) - set(names):
            delattr(module, name)
        for name, value in names.items():
            setattr(module, name, value)
        for kind, own in methods:
            for name, value in own.items():
                if callable(value) and vars(kind).get(name) is not value:
                    setattr(kind, name, value)


@dataclass(frozen=True)
class Explaining:
    """One engine on one input, shaped as its example."""

    engine: relprop.Engine
    args: tuple[Tensor, ...]
    target: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.engine(*self.args, target=self.target, **self.kwargs)

    def forecast_mb(self) -> float:
        """What the engine says it takes, beside weights and inputs; NaN where its probes, of 4 samples, do not fit."""
        given = sum(tensor.nbytes for tensor in self.args)
        try:
            return (self.engine.memory(len(self.args[0])) - given) / 2**20
        except torch.OutOfMemoryError:
            return float("nan")


def weights_mb(model: nn.Module) -> float:
    """What parameters and buffers take."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**20


def attempt(
    machine: Machine,
    name: str,
    run: Callable[[], Run],
    *,
    checked: Key | None = None,
    model: nn.Module | None = None,
    **row: Any,
) -> float:
    """Time one contender; what fails is a row of its own and stops nothing. Milliseconds, NaN where it failed.

    Args:
        checked: what must have passed for a time to be taken; None for other people's code
        model: whose weights are no part of `beyond_weights_mb`; nothing that was made of them before stays, so that an
            engine's forecast and what was there before it make `predicted_mb`, which stands beside `peak_mb`
    """
    if checked is not None and checked not in machine.passed():
        machine.add(run=name, **row, failed="no check of it passed")
        return float("nan")
    if model is not None:
        derived_weights(model).clear()
    gc.collect()
    if not machine.dry:
        torch.cuda.empty_cache()  # what another one left, or what did not fit
    before = machine.allocated_mb()
    try:
        made = run()
        found = machine.time(made)
        if model is not None and isinstance(made, Explaining):
            found["predicted_mb"] = before + made.forecast_mb()
    except Exception as problem:
        machine.add(run=name, **row, failed=told(problem))
        return float("nan")
    if model is not None:
        found["beyond_weights_mb"] = found["peak_mb"] - weights_mb(model)
    machine.add(run=name, **row, **found, failed="")
    return found["ms"]
