"""Modified gradients through the model's own backward pass, against compiled relevance and against LXT itself."""

from __future__ import annotations

import contextlib
import copy
import io
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


class Between(nn.Module):
    """Two projections a and b of the input, a function of both, a head."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.head, self.function = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(6, 5), function
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x)))


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True) + 1e-6


def share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


SPELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Gemma's norm": lambda a, b: a * torch.pow(mean_square(a), -0.5),
    "norm by an operator": lambda a, b: a * mean_square(a) ** -0.5,
    "norm by 1 / sqrt": lambda a, b: a * (1 / torch.sqrt(mean_square(a))),
    "norm by reciprocal": lambda a, b: mean_square(a).sqrt().reciprocal() * a,
    "layer norm": lambda a, b: (a - a.mean(-1, keepdim=True)) / (a.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt(),
    "length": lambda a, b: a / (a.norm(dim=-1, keepdim=True) + 1e-6),
    "softmax": lambda a, b: share(a.exp()),
    "statistic of another": lambda a, b: a * torch.rsqrt(mean_square(b)),
    "statistic as a value": lambda a, b: a + mean_square(b).sqrt(),
    "root": lambda a, b: nn.functional.softplus(a).sqrt(),
    "softsign": lambda a, b: nn.functional.softsign(a),
    "tanhshrink": lambda a, b: nn.functional.tanhshrink(a),
    "quick gelu": lambda a, b: a * torch.sigmoid(1.702 * a),
    "gelu": lambda a, b: 0.5 * a * (1 + torch.tanh(0.79788456 * (a + 0.044715 * torch.pow(a, 3.0)))),
    "sum of one value": lambda a, b: a + (torch.relu(a) + 1),
    "gate": lambda a, b: nn.functional.silu(a) * b,
    "moved gate": lambda a, b: a * b.tanh().flatten(1),
    "quotient": lambda a, b: a / (2 + torch.tanh(b)),
    "constant by a value": lambda a, b: 3 / (b * b + 1),
}


@pytest.mark.parametrize("method", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", SPELLED)
def test_spellings_are_the_same_as_compiled(name: str, method: str) -> None:
    model, x = Between(SPELLED[name]), torch.randn(3, 12, dtype=torch.float64)
    expected = relprop.explain(model, x, target=3, method=method, method_options={"channels": "kept"}).relevance
    assert relative(relevance(BLOCKS[method], model, x), expected) < 1e-12


def in_place_operators(a: Tensor, b: Tensor) -> Tensor:
    a *= b
    a += b
    a /= 2
    a -= b
    a /= 2 + b.tanh()
    return a


F = nn.functional
# A function in place, and the same out of place.
IN_PLACE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{
        f"{name}_": (lambda a, b, n=name: getattr(torch.Tensor, f"{n}_")(a), lambda a, b, n=name: getattr(a, n)())
        for name in ("relu", "sigmoid", "tanh", "exp", "square", "abs", "sin", "cos", "erf", "neg")
    },
    **{
        f"F.{name}_": (
            lambda a, b, n=name: getattr(F, f"{n}_")(a),
            lambda a, b, n=name: getattr(F, n)(a),
        )
        for name in ("relu", "elu", "leaky_relu", "selu", "celu", "hardtanh")
    },
    **{
        f"F.{name}(inplace=True)": (
            lambda a, b, n=name: getattr(F, n)(a, inplace=True),
            lambda a, b, n=name: getattr(F, n)(a),
        )
        for name in (
            *("relu", "silu", "elu", "leaky_relu", "selu", "celu", "hardtanh"),
            *("relu6", "hardswish", "hardsigmoid", "mish"),
        )
    },
    **{
        f"{name}_ of both": (lambda a, b, n=name: getattr(a, f"{n}_")(b), lambda a, b, n=name: getattr(torch, n)(a, b))
        for name in ("mul", "div", "add", "sub")
    },
    "mul_ of itself": (lambda a, b: a.mul_(a.sigmoid()), lambda a, b: a * a.sigmoid()),
    "mul_ of a number": (lambda a, b: a.mul_(3), lambda a, b: 3 * a),
    "div_ of its sum": (lambda a, b: a.div_(a.sum(-1, keepdim=True)), lambda a, b: a / a.sum(-1, keepdim=True)),
    "pow_": (lambda a, b: a.pow_(3), lambda a, b: a.pow(3)),
    "clamp_": (lambda a, b: a.clamp_(-0.3, 0.4), lambda a, b: a.clamp(-0.3, 0.4)),
    "sqrt_": (lambda a, b: a.square_().add_(1).sqrt_(), lambda a, b: (a.square() + 1).sqrt()),
    "operators": (in_place_operators, lambda a, b: ((a * b + b) / 2 - b) / (2 + b.tanh())),
    "a view": (
        lambda a, b: (a[:, 2:].relu_(), a)[1],
        lambda a, b: torch.cat([a[:, :2], a[:, 2:].relu()], 1),
    ),
    "an item": (
        lambda a, b: a.__setitem__((slice(None), 0), b[:, 1]),
        lambda a, b: torch.cat([b[:, 1:2], a[:, 1:]], 1),
    ),
}


@pytest.mark.parametrize("form", ["statement", "expression"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_the_same_as_out_of_place(name: str, form: str) -> None:
    """Forward too: what an in-place function writes is in the tensor that its caller has."""
    in_place, out_of_place = IN_PLACE[name]

    def written(a: Tensor, b: Tensor) -> Tensor:
        a = a.clone()
        result = in_place(a, b)
        return a if form == "statement" or result is None else result

    x = torch.randn(3, 12, dtype=torch.float64)
    model = Between(written)
    with lxt.attnlrp(model):
        assert torch.equal(model(x), Between(out_of_place)(x))
    assert relative(relevance(lxt.attnlrp, model, x), relevance(lxt.attnlrp, Between(out_of_place), x)) < 1e-12


def test_a_buffer_filled_in_place_carries_relevance() -> None:
    def filled(a: Tensor, b: Tensor) -> Tensor:
        buffer = torch.zeros(3, 6, dtype=a.dtype)
        buffer[:, :4] = a[:, :4]
        buffer[:, 4:].copy_(b[:, 4:])
        return buffer.tanh() * b

    x = torch.randn(3, 12, dtype=torch.float64)
    expected = relevance(lxt.attnlrp, Between(lambda a, b: torch.cat([a[:, :4], b[:, 4:]], 1).tanh() * b), x)
    assert relative(relevance(lxt.attnlrp, Between(filled), x), expected) < 1e-12


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "'glu'": lambda a, b: F.glu(torch.cat([a, b], -1)),
    "'prelu'": lambda a, b: F.prelu(a, torch.tensor([0.2], dtype=a.dtype)),
    "'maximum'": torch.maximum,
    "'max'": torch.max,
    "'lerp'": lambda a, b: torch.lerp(a, b, a.sigmoid()),
    "'addcmul'": lambda a, b: torch.addcmul(a, b, a),
    "'exp2'": lambda a, b: torch.exp2(a),
    "'log_softmax'": lambda a, b: a.log_softmax(-1),
    "'cosine_similarity'": lambda a, b: a * F.cosine_similarity(a, b)[:, None],
    "'div' of a non-linearity that is computed twice": lambda a, b: a.exp() / a.exp().sum(-1, keepdim=True),
    "'rpow'": lambda a, b: 2**a,
    "'pow' of more than one": lambda a, b: (a * a) ** b,
    "'expand' of a variance, deviation or norm": lambda a, b: a.std(-1, keepdim=True).expand(3, 6).tanh(),
    "'mul' of a variance, deviation or norm": lambda a, b: b * a.std(-1, keepdim=True),
    "'norm' without its axis kept": lambda a, b: a / a.norm(dim=-1)[:, None],
    "'batch_norm' in training": lambda a, b: F.batch_norm(a, None, None, training=True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_rule_is_refused(words: str) -> None:
    function, x = Between(REFUSED[words]), torch.randn(3, 12, dtype=torch.float64)
    with pytest.raises(UnsupportedOpError, match=f"expected operations with a rule, got torch function {words}"):
        relevance(lxt.attnlrp, function, x)


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
    own = [set(module.__dict__) for module in model.modules()]
    plain = relevance(contextlib.nullcontext, model, x)
    with pytest.raises(ZeroDivisionError), lxt.attnlrp(model), lxt.cp_lrp(model):
        assert len(model._forward_hooks) == 1  # that both blocks share
        raise ZeroDivisionError
    assert {type(module): type(module).forward for module in model.modules()} == classes
    assert [set(module.__dict__) for module in model.modules()] == own
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(relevance(contextlib.nullcontext, model, x), plain)


def test_a_forward_of_its_own_is_kept() -> None:
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


def test_blocks_that_end_out_of_order() -> None:
    models, x = [vit(0), vit(1)], torch.randn(1, 3, 32, 32)
    expected = [relevance(lxt.attnlrp, model, x) for model in models]
    plain = [relevance(contextlib.nullcontext, model, x) for model in models]
    blocks = [lxt.attnlrp(model) for model in models]
    for block, model in zip(blocks, models, strict=True):
        block.__enter__()
        model(x)
    blocks[0].__exit__(None, None, None)
    assert torch.equal(relevance(contextlib.nullcontext, models[0], x), plain[0])
    assert torch.equal(relevance(contextlib.nullcontext, models[1], x), expected[1])
    blocks[1].__exit__(None, None, None)
    assert torch.equal(relevance(contextlib.nullcontext, models[1], x), plain[1])
    assert not lxt._ACTIVE.get()


def test_a_copy_made_inside_stands_alone() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    plain, expected = (relevance(block, model, x) for block in (contextlib.nullcontext, lxt.attnlrp))
    with lxt.attnlrp(model):
        twin, stored = copy.deepcopy(model), io.BytesIO()
        torch.save(model, stored)
        model(x)
        assert torch.equal(relevance(contextlib.nullcontext, twin, x), plain)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for found in (twin, loaded):
        assert torch.equal(relevance(contextlib.nullcontext, found, x), plain)
        assert torch.equal(relevance(lxt.attnlrp, found, x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert float(twin(x).abs().max()) == 0.0


def test_a_forward_assigned_inside_stays() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    expected = relevance(lxt.attnlrp, model, x)
    original = model.forward

    def doubled(x: Tensor) -> Tensor:
        return 2 * original(x)

    with lxt.attnlrp(model):
        model.forward = doubled  # type: ignore[method-assign]
        assert relative(relevance(contextlib.nullcontext, model, x), 2 * expected) < 1e-6
    assert model.forward is doubled


def test_blocks_on_a_model_and_a_part_of_it() -> None:
    """The part's rules hold inside it, the model's around it."""
    model, x = vit(), torch.randn(1, 3, 32, 32)
    expected = [relevance(block, model, x) for block in (lxt.attnlrp, lxt.cp_lrp)]
    with contextlib.ExitStack() as parts:
        for block in model.get_submodule("blocks"):  # type: ignore[attr-defined]
            parts.enter_context(lxt.cp_lrp(block))
        assert relative(relevance(lxt.attnlrp, model, x), expected[1]) < 1e-5
    assert relative(relevance(lxt.attnlrp, model, x), expected[0]) < 1e-5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_the_model_leaves_no_mode_behind(error: type[BaseException]) -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise error

    model, x = vit(), torch.randn(1, 3, 32, 32)
    plain = relevance(contextlib.nullcontext, model, x)
    handle = model.get_submodule("blocks.1").register_forward_pre_hook(fail)
    with pytest.raises(error), lxt.attnlrp(model):
        model(x)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(relevance(contextlib.nullcontext, model, x), plain)


def test_a_leaf_that_a_hook_puts_in() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_submodule("blocks.0").register_forward_hook(cut)
    with lxt.attnlrp(model), torch.enable_grad():
        model(x)[:, 3].sum().backward()
    handle.remove()
    options = {"method": "attnlrp", "method_options": {"rows": "all"}, "latents": ["blocks.0"]}
    expected = relprop.explain(model, x, target=3, **options).at("blocks.0").relevance
    assert relative((leaves[0] * leaves[0].grad).detach(), expected) < 1e-4


@pytest.mark.filterwarnings("default")
def test_a_block_without_a_call_warns() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    words = "expected a call of this VisionTransformer in the block and its thread, got none"
    with pytest.warns(RuntimeWarning, match=words), lxt.attnlrp(model):
        model.forward_head(model.forward_features(x))  # type: ignore[operator]
    with pytest.warns(RuntimeWarning, match=words), lxt.attnlrp(model):
        worker = threading.Thread(target=model, args=(x,))
        worker.start()
        worker.join()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(RuntimeWarning, match=words), lxt.attnlrp(model):
        compiled(x)
    with pytest.raises(ModelStateError, match="expected a module that torch.compile has not wrapped"):
        lxt.attnlrp(compiled).__enter__()


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
    assert not model._forward_hooks


def test_threads_that_open_and_close_at_any_time() -> None:
    """Blocks of one model that begin and end while others call it, in a block or in none."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(2, 3)
    before = relevance(lxt.attnlrp, model, x, target=1)
    problems: list[Exception] = []

    def run(block: Any) -> None:
        try:
            for _ in range(1500):
                with block(model):
                    model(x)
        except Exception as problem:
            problems.append(problem)

    blocks = [contextlib.nullcontext, lxt.attnlrp, lxt.attnlrp, lxt.attnlrp]
    threads = [threading.Thread(target=run, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(relevance(lxt.attnlrp, model, x, target=1), before)


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


def test_training_mode_has_no_dropout() -> None:
    model, x = vit(proj_drop_rate=0.5, attn_drop_rate=0.5), torch.randn(1, 3, 32, 32)
    expected = relevance(lxt.attnlrp, model, x)
    assert torch.equal(relevance(lxt.attnlrp, model.train(), x), expected)


def test_training_mode_has_no_dropout_in_stock_attention() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0].mean(1))

    model, x = Attending().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    expected = relevance(lxt.attnlrp, model.eval(), x)
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
    checkpointed = vit()
    checkpointed.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(ModelStateError, match="expected no gradient checkpointing"), lxt.attnlrp(checkpointed):
        pass
    bert = text("bert").model.train()  # type: ignore[union-attr]
    bert.gradient_checkpointing_enable()  # type: ignore[operator, union-attr]
    with pytest.raises(ModelStateError, match="expected no gradient checkpointing"), lxt.attnlrp(bert):  # type: ignore
        pass
