"""Attention steps that one kernel takes whole: the answers of the path through maps, and no maps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relprop
from relprop import native
from relprop.program import Program
from tests.engine.models import Spelled, relative, vit

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

TILED = [
    "transformer_attribution",
    "relevance_rollout",
    "generic_attention",
    "attention_rollout",
    "full",
    "gradient_x_input",
    "last_layer",
    "second_layer",
    "last_layer_attention",
]
COMPOSITES = ["chefer", "chefer_stable"]


def without_tiles(engine: relprop.Engine) -> relprop.Engine:
    """The same engine on the path through maps."""
    plain = replace(engine.program, reverse=tuple(replace(step, joint=None) for step in engine.program.reverse))
    parts = (engine._model, engine._captured, plain, engine._backend, engine._precision, engine._dtype, engine._device)
    return relprop.Engine(*parts)


def joint_steps(program: Program) -> list[bool]:
    return [step.joint is not None for step in program.reverse if step.node.kind == "attention"]


def assert_both_paths_agree(engine: relprop.Engine, *inputs: Tensor, tolerance: float = 1e-10, **options: Any) -> None:
    assert all(joint_steps(engine.program)) and joint_steps(engine.program)
    tiles, maps = (e(*inputs, **options).relevance for e in (engine, without_tiles(engine)))
    assert tiles.shape == maps.shape and bool(tiles.isfinite().all())
    assert relative(tiles, maps) < tolerance


class Decoder(nn.Module):
    """Two blocks of causal attention with grouped heads; padding is masked, the last token is read."""

    def __init__(self, causal: bool = True, masked: str = "", key_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal, self.masked, self.key_heads = causal, masked, key_heads
        self.embed = nn.Linear(6, 24)
        self.q, self.o = (nn.ModuleList(nn.Linear(24, 24) for _ in range(2)) for _ in range(2))
        self.k, self.v = (nn.ModuleList(nn.Linear(24, 6 * key_heads) for _ in range(2)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def mask(self, seen: Tensor) -> Tensor | None:
        if self.masked == "bool":
            return seen[:, None, None, :]
        if self.masked == "bias":
            return (~seen)[:, None, None, :].to(torch.float64) * torch.finfo(torch.float64).min
        return None

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        for q, k, v, o, norm in zip(self.q, self.k, self.v, self.o, self.norms, strict=True):
            y = norm(x)
            heads = [f(y).view(batch, tokens, -1, 6).transpose(1, 2) for f in (q, k, v)]
            grouped = self.key_heads != 4
            out = F.scaled_dot_product_attention(
                *heads, attn_mask=self.mask(seen), is_causal=self.causal, enable_gqa=grouped
            )
            x = x + o(out.transpose(1, 2).reshape(batch, tokens, -1))
        return self.head(x[:, -1])


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("method", TILED)
def test_vit(method: str, composite: str) -> None:
    model, x = vit().double(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    engine = relprop.compile(model, (x,), method=method, composite=composite, backend="cpp")
    assert_both_paths_agree(engine, x, target=torch.tensor([[1, 7], [0, 2], [3, 3]]))
    plain = relprop.compile(model, (x,), method=method, composite=composite, backend="torch")
    assert not any(joint_steps(plain.program))
    assert relative(engine(x).relevance, plain(x).relevance) < 1e-9


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_pooled_vit(pool: str) -> None:
    """Every row of the last layer is read where tokens are pooled."""
    model, x = vit(global_pool=pool, class_token=pool == "token", fc_norm=False).double(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (x.double(),), backend="cpp")
    assert_both_paths_agree(engine, x.double())


@pytest.mark.parametrize("method", ["transformer_attribution", "full", "gradient_x_input", "generic_attention"])
@pytest.mark.parametrize("options", [{}, {"causal": False, "masked": "bool"}, {"causal": False, "masked": "bias"}])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_causal_and_masked_models(key_heads: int, options: dict[str, Any], method: str) -> None:
    model = Decoder(key_heads=key_heads, **options).double().eval()
    x = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    engine = relprop.compile(model, (x, seen), method=method, backend="cpp")
    assert_both_paths_agree(engine, x, seen, target=torch.tensor([0, 1, 4]))


@pytest.mark.parametrize("spelling", ["sdpa", "matmul", "bmm"])
def test_every_spelling(spelling: str) -> None:
    model, x = Spelled(spelling).double().eval(), torch.randn(3, 3, 32, 32).double()
    engine = relprop.compile(model, (x,), backend="cpp")
    assert_both_paths_agree(engine, x, target=2)


def test_rounded_models() -> None:
    """The gradient of a bfloat16 model does not see that its output was rounded."""
    model, x = vit().bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    engine = relprop.compile(model, (x,), composite="chefer_stable", backend="cpp")
    assert_both_paths_agree(engine, x, tolerance=1e-4)


def test_a_softmax_that_is_detached() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32).double()
    rules = relprop.find_composite("chefer").overridden(relprop.entry("softmax", "detached"), name="detached")
    assert_both_paths_agree(relprop.compile(model, (x,), composite=rules, backend="cpp"), x)


def test_what_asks_for_maps_gets_them() -> None:
    """A trace and a ledger look inside; Grad-CAM weighs whole maps."""
    model, x = vit().double(), torch.randn(2, 3, 32, 32).double()
    engine = relprop.compile(model, (x,), backend="cpp")
    answer = engine(x, target=3)
    assert engine(x, target=3, ledger=True).ledger is not None
    assert relative(engine(x, target=3, ledger=True).relevance, answer.relevance) < 1e-10
    maps = engine.trace(x, target=3).maps
    assert maps["blocks.0.attn", "relevance"].shape == (1, 2, 4, 17, 17)
    cam = relprop.compile(model, (x,), method="attention_gradcam", backend="cpp")
    assert not any(joint_steps(cam.program))


def test_rules_that_the_kernel_does_not_have() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32).double()
    rules = relprop.find_composite("chefer").overridden(relprop.entry("softmax", "taylor"), name="taylor")
    engine = relprop.compile(model, (x,), composite=rules, backend="cpp")
    assert not any(joint_steps(engine.program)) and bool(engine(x).relevance.isfinite().all())


def test_the_table_shows_the_kernel() -> None:
    engine = relprop.compile(vit(), (torch.randn(2, 3, 32, 32),), backend="cpp")
    rows = [line for line in str(engine.program).splitlines() if ".attn " in line and "attention" in line]
    reverse = rows[len(rows) // 3 :]
    assert reverse and all("cpp (joint)" in line for line in reverse)
    rollout = relprop.compile(vit(), (torch.randn(2, 3, 32, 32),), method="attention_rollout", backend="cpp")
    assert sum("row " in line and "cpp (joint)" in line for line in str(rollout.program).splitlines()) == 3


MEMORY = """
import resource, sys, timm, torch, relprop
torch.manual_seed(0)
size = 8 * int(sys.argv[1])
model = timm.models.vision_transformer.VisionTransformer(
    img_size=size, patch_size=8, num_classes=4, embed_dim=32, depth=2, num_heads=4
).eval()
x = torch.randn(1, 3, size, size)
engine = relprop.compile(model, (x,), method=sys.argv[2], backend="cpp")
warm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine(x, target=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm)
"""


@pytest.mark.parametrize("method", ["transformer_attribution", "attention_rollout"])
def test_memory_is_linear_in_the_number_of_tokens(method: str) -> None:
    """4097 tokens: one map of the four heads would be 256 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "64", method], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) / 1024 < 100
