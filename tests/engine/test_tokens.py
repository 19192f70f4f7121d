"""Rows that walk through attention pooling, class attention and talking heads, against the matrices written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import UnsupportedTopologyError
from tests.engine.models import relative
from tests.families.vision_models import swin, timm_small

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class _Maps:
    """Attention maps [B, H, Nq, Nk] of a stock model and their gradients, taken with hooks, first layer first."""

    def __init__(self, model: nn.Module, places: list[tuple[nn.Module, bool]], target: int) -> None:
        """places: modules whose input is a layer's attention map, and whether heads are its last axis there."""
        self.taken: list[tuple[Tensor, bool]] = []
        handles = [m.register_forward_pre_hook(self._hook(last)) for m, last in places]
        model(X)[:, target].sum().backward()
        for handle in handles:
            handle.remove()

    def _hook(self, last: bool) -> Any:
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            self.taken.append((args[0], last))

        return take

    def edges(self, method: str) -> list[Tensor]:
        """E of every layer [B, Nq, Nk]."""
        found = []
        for tensor, last in self.taken:
            attention, gradient = tensor.detach(), tensor.grad
            assert gradient is not None
            part = attention if method == "attention_rollout" else (attention * gradient).clamp(min=0)
            found.append(part.mean(-1) if last else part.mean(1))
        return found


def _self_attention(e: Tensor, normalise: bool) -> Tensor:
    """I + E."""
    matrix = e + torch.eye(e.shape[-1], dtype=e.dtype)
    return matrix / matrix.sum(-1, keepdim=True) if normalise else matrix


@pytest.mark.parametrize("method", ["attention_rollout", "generic_attention"])
def test_attention_pooling_is_one_more_row(method: str) -> None:
    """The learned query keeps nothing for itself: its row over the patches starts the walk."""
    model = timm_small("vit_base_patch16_siglip_224").double()
    pool = model.attn_pool
    for module in (*(block.attn for block in model.blocks), pool):
        module.fused_attn = False
    maps = _Maps(model, [(block.attn.attn_drop, False) for block in model.blocks], 3)
    tokens: list[Tensor] = []
    handle = pool.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model(X)
    handle.remove()
    attention, gradient = _pool_map(model, tokens[0].detach())
    edge = attention if method == "attention_rollout" else (attention * gradient).clamp(min=0)
    row = edge.mean(1)  # [B, 1, N]
    for e in reversed(maps.edges(method)):
        row = row @ _self_attention(e, method == "attention_rollout")
    found = relprop.explain(model, X, target=3, method=method)
    assert relative(found.relevance, row[:, 0]) < 1e-10
    assert found.token_kinds == ("patch",) * 16


def _pool_map(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's map, written out, and its gradient. [B, H, 1, N]"""
    pool: Any = model.attn_pool
    batch, count, channels = x.shape
    q = pool.q(pool.latent.expand(batch, -1, -1)).reshape(batch, 1, pool.num_heads, -1).transpose(1, 2)
    k, v = pool.kv(x).reshape(batch, count, 2, pool.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    attention = ((q * pool.scale) @ k.mT).softmax(-1).detach().requires_grad_()
    out = pool.proj((attention @ v).transpose(1, 2).reshape(batch, 1, channels))
    out = (out + pool.mlp(pool.norm(out)))[:, 0]
    logits = model.head(model.fc_norm(out))
    logits[:, 3].sum().backward()
    assert attention.grad is not None
    return attention.detach(), attention.grad


@pytest.mark.parametrize("method", ["attention_rollout", "generic_attention"])
def test_class_attention_and_talking_heads(method: str) -> None:
    """Talking heads' maps are their softmax; class attention has the class token's row alone."""
    model = timm_small("cait_xxs24_224").double()
    normalise = method == "attention_rollout"
    for block in model.blocks_token_only:
        block.attn.fused_attn = False
    places = [(block.attn.proj_w, True) for block in model.blocks]
    places += [(block.attn.attn_drop, False) for block in model.blocks_token_only]
    edges = _Maps(model, places, 2).edges(method)
    depth = len(model.blocks)
    row = torch.zeros(2, 1, 17, dtype=X.dtype)
    row[..., 0] = 1
    for e in reversed(edges[depth:]):
        whole = torch.zeros(2, 17, 17, dtype=X.dtype)
        whole[:, :1] = e
        row = row @ _self_attention(whole, normalise)
    for e in reversed(edges[:depth]):
        row = torch.cat([row[..., :1], row[..., 1:] @ _self_attention(e, normalise)], -1)
    found = relprop.explain(model, X, target=2, method=method)
    assert relative(found.relevance, row[:, 0]) < 1e-10
    assert found.token_kinds == ("class",) + ("patch",) * 16


def test_one_layer_of_class_attention() -> None:
    model = timm_small("cait_xxs24_224").double()
    found = relprop.explain(model, X, target=2, method="raw_attention")
    assert found.relevance.shape == (2, 17)
    assert torch.allclose(found.relevance.sum(-1), torch.ones(2, dtype=X.dtype))
    with pytest.raises(UnsupportedTopologyError, match=r"tokens that the output reads, got .*blocks\.1"):
        relprop.explain(model, X, method="second_layer")


def test_trust_check_through_pooling() -> None:
    model = timm_small("vit_base_patch16_siglip_224")
    found = relprop.explain(model, X.float(), composite="chefer_stable", check=True)
    assert found.disagreement is not None and float(found.disagreement.max()) < 1e-2


def test_windows_are_refused_with_what_works() -> None:
    with pytest.raises(UnsupportedTopologyError) as caught:
        relprop.explain(swin("swin_tiny_patch4_window7_224"), X.float())
    text = str(caught.value)
    assert "at layers.0.blocks.0.attn" in text and "it attends within 4 windows of each sample" in text
    assert "Methods 'full' and 'gradient_x_input' explain such a model" in text
