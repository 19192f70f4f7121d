"""Modified gradients through the model's own backward pass, against compiled relevance and against LXT itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import relprop
from relprop.compat import lxt
from relprop.errors import ModelStateError, OptionError, UnsupportedOpError
from tests.engine.models import Spelled, relative, vit

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCKS = {"attnlrp": lxt.attnlrp, "cp_lrp": lxt.cp_lrp, "libragrad": lxt.libragrad}


class Embedded(nn.Module):
    """A text model from its embeddings."""

    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, embeds: Tensor) -> Tensor:
        return self.read(self.model(inputs_embeds=embeds))


def text(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name.startswith("llama"):
        config = transformers.LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
        implementation = name.removeprefix("llama_")
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)
        return Embedded(model, lambda output: output.logits[:, -1])
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=4,
        )
        return Embedded(transformers.BertForSequenceClassification(config), lambda output: output.logits)
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    return Embedded(transformers.GPT2LMHeadModel(config), lambda output: output.logits[:, -1])


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model that torch spells in its own way, and an input."""
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if name == "vit":
        return vit(), image
    if name in ("sdpa", "matmul", "bmm"):
        return Spelled(name), image
    if name == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 64, num_classes=7)
        nn.init.normal_(model.heads.head.weight)
        return model, image
    if name == "eva":
        import timm

        torch.manual_seed(0)
        options = {"embed_dim": 48, "depth": 2, "num_heads": 4, "swiglu_mlp": True, "use_rot_pos_emb": True}
        return timm.models.eva.Eva(img_size=32, patch_size=8, num_classes=5, **options), image
    return text(name), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def relevance(block: Any, model: nn.Module, x: Tensor, target: int = 3) -> Tensor:
    leaf = x.clone().requires_grad_()
    with block(model):
        model(leaf)[:, target].sum().backward()
    assert leaf.grad is not None
    return (leaf * leaf.grad).detach()


NAMES = ["vit", "sdpa", "matmul", "bmm", "torchvision", "eva", "llama_sdpa", "llama_eager", "bert", "gpt2"]


CASES = [(name, "attnlrp") for name in NAMES] + [
    (name, method) for name in ("vit", "matmul", "torchvision", "llama_eager") for method in ("cp_lrp", "libragrad")
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_same_as_compiled(name: str, method: str) -> None:
    model, x = make(name)
    model, x = model.double().eval(), x.double()
    before = model(x)
    found = relevance(BLOCKS[method], model, x)
    expected = relprop.explain(model, x, target=3, method=method, method_options={"channels": "kept"}).relevance
    assert relative(found, expected) < 1e-6  # a Llama's norms compute in float32
    assert torch.equal(model(x), before)
    with BLOCKS[method](model):
        assert torch.allclose(model(x), before)


def test_the_same_as_lxt_on_torchvision() -> None:
    pytest.importorskip("lxt")
    pytest.importorskip("zennit")
    from benchmarks.numerics.lxt import Lxt

    model, x = make("torchvision")
    model, x = model.double().eval(), x.double()
    assert relative(relevance(lxt.cp_lrp, model, x).sum(1), Lxt().explain(model, x, 3)) < 1e-6


THEIRS = """
import json, sys, torch, transformers.pytorch_utils as utils
for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
    if not hasattr(utils, name):
        setattr(utils, name, None)
from transformers.models.llama import modeling_llama
from lxt.efficient import monkey_patch
monkey_patch(modeling_llama)
modeling_llama.ALL_ATTENTION_FUNCTIONS = type("Found", (dict,), {"get_interface": lambda s, n, d: s.get(n, d)})(
    modeling_llama.ALL_ATTENTION_FUNCTIONS)
from tests.compat.test_lxt import example_of_the_readme
print(json.dumps(example_of_the_readme(None).tolist()))
"""


def example_of_the_readme(block: Any) -> Tensor:
    """LXT's quick start, its lines after the import; without `block` the classes are patched already."""
    model = text("llama_eager").model.eval()
    for param in model.parameters():  # type: ignore[union-attr]
        param.requires_grad = False
    input_ids = torch.tensor([[3, 1, 4, 1, 5]])
    input_embeds = model.get_input_embeddings()(input_ids)  # type: ignore[operator, union-attr]
    with block(model) if block is not None else contextlib.nullcontext():
        output_logits = model(inputs_embeds=input_embeds.requires_grad_(), use_cache=False).logits  # type: ignore
        max_logits, _ = torch.max(output_logits[0, -1, :], dim=-1)
        max_logits.backward(max_logits)
    return (input_embeds * input_embeds.grad).float().sum(-1).detach().cpu()[0]


def test_the_same_as_lxt_on_llama() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lxt")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", THEIRS]
    path = {"PYTHONPATH": ":".join([str(root), *filter(None, sys.path)])}
    ran = subprocess.run(command, cwd=root, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = torch.tensor(json.loads(ran.stdout.splitlines()[-1]))
    assert relative(example_of_the_readme(lxt.attnlrp), expected) < 1e-5


def test_reversible() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    classes = {type(module): type(module).forward for module in model.modules()}
    own = [dict(module.__dict__) for module in model.modules()]
    plain = relevance(contextlib.nullcontext, model, x)
    with pytest.raises(ZeroDivisionError), lxt.attnlrp(model), lxt.cp_lrp(model):
        assert "forward" in model.__dict__
        raise ZeroDivisionError
    assert {type(module): type(module).forward for module in model.modules()} == classes
    assert [set(module.__dict__) for module in model.modules()] == [set(found) for found in own]
    assert torch.equal(relevance(contextlib.nullcontext, model, x), plain)


def test_a_forward_of_its_own_is_put_back() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    original = model.forward
    model.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    mine = model.forward
    doubled = relevance(lxt.attnlrp, model, x)
    assert model.forward is mine
    assert relative(doubled, 2 * relevance(lxt.attnlrp, vit(), x)) < 1e-5


def test_one_model_alone() -> None:
    model, other, x = vit(0), vit(1), torch.randn(1, 3, 32, 32)
    plain = relevance(contextlib.nullcontext, other, x)
    with lxt.attnlrp(model):
        assert torch.equal(relevance(contextlib.nullcontext, other, x), plain)
        inner = relevance(lxt.cp_lrp, model, x)  # the inner block counts
        again = relevance(contextlib.nullcontext, model, x)
    assert relative(inner, relevance(lxt.cp_lrp, model, x)) < 1e-6
    assert relative(again, relevance(lxt.attnlrp, model, x)) < 1e-6


def test_threads() -> None:
    """Each thread has the rules that it asked for, whatever others do to the same model meanwhile."""
    model, x = vit(), torch.randn(1, 3, 32, 32)
    kinds = [contextlib.nullcontext, lxt.attnlrp, lxt.cp_lrp] * 2
    expected = [relevance(kind, model, x) for kind in kinds]
    wrong: list[float] = []

    def run(i: int) -> None:
        for _ in range(8):
            leaf = x.clone().requires_grad_()
            with kinds[i](model):
                (gradient,) = torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)
            error = relative((leaf * gradient).detach(), expected[i])
            if error > 1e-5:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in model.__dict__


def test_hooks_see_relevance() -> None:
    model, x = vit().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    block, seen = model.get_submodule("blocks.1"), {}

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["activation"] = output.detach()

    def backward(module: nn.Module, given: Any, arrived: Any) -> None:
        seen["gradient"] = arrived[0]

    handles = [block.register_forward_hook(forward), block.register_full_backward_hook(backward)]
    relevance(lxt.attnlrp, model, x)
    for handle in handles:
        handle.remove()
    options = {"method": "attnlrp", "method_options": {"rows": "all"}, "latents": ["blocks.1"]}
    expected = relprop.explain(model, x, target=3, **options).at("blocks.1").relevance
    assert relative(seen["activation"] * seen["gradient"], expected) < 1e-9


def test_a_training_loop() -> None:
    """A loss on relevance itself: its gradients reach the weights, and it goes down."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        leaf = x.clone().requires_grad_()
        with lxt.attnlrp(model), sdpa_kernel(SDPBackend.MATH):
            score = model(leaf)[:, 3].sum()
            (gradient,) = torch.autograd.grad(score, leaf, create_graph=True)
            outside = (leaf * gradient)[..., :16].square().sum()
        optimiser.zero_grad()
        outside.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "qkv.weight" in n)
        optimiser.step()
        losses.append(float(outside))
    assert losses[-1] < losses[0]


def test_training_mode_has_no_dropout() -> None:
    model, x = vit(proj_drop_rate=0.5, attn_drop_rate=0.5), torch.randn(1, 3, 32, 32)
    expected = relevance(lxt.attnlrp, model, x)
    assert torch.equal(relevance(lxt.attnlrp, model.train(), x), expected)


def test_token_ids_and_parameters() -> None:
    """Relevance at the embeddings' output, reached from ids, with weights that take part in the graph."""
    bert = text("bert").double().eval().model
    ids, kept = torch.tensor([[3, 1, 4, 1, 5]]), []
    handle = bert.get_input_embeddings().register_forward_hook(lambda m, a, output: kept.append(output))  # type: ignore
    with lxt.attnlrp(bert) as model:  # type: ignore[type-var]
        logits = model(input_ids=ids).logits  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(logits[0, 1], kept[0])
    handle.remove()
    expected = relprop.explain(bert, input_ids=ids, target=1, method="attnlrp").relevance  # type: ignore[arg-type]
    assert relative((kept[0] * gradient).sum(-1).detach(), expected) < 1e-9


def test_compiling_inside_the_block() -> None:
    model, x = vit().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = relprop.explain(vit().double(), x, target=3).relevance
    with lxt.attnlrp(model):
        assert relative(relprop.explain(model, x, target=3).relevance, expected) < 1e-9


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="model: expected a torch.nn.Module, got str"), lxt.attnlrp("gpt2"):  # type: ignore
        pass
    with (
        pytest.raises(OptionError, match="composite 'chefer': expected linear rule epsilon, got alpha_beta"),
        lxt.modified_gradients(vit(), "chefer"),
    ):
        pass
    checkpointed = vit().train()
    checkpointed.gradient_checkpointing = True  # type: ignore[assignment]
    with pytest.raises(ModelStateError, match="expected no gradient checkpointing"), lxt.attnlrp(checkpointed):
        pass

    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.glu(x)

    with pytest.raises(UnsupportedOpError, match="got torch function 'glu'"):
        relevance(lxt.attnlrp, Gated(), torch.randn(1, 8))
