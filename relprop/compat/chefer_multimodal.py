"""The interfaces of Transformer-MM-Explainability (ICCV 2021) for two modalities, on stock Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from relprop.capture.export import bind_arguments
from relprop.compat.chefer_index import LayerIndexError, alone, class_score
from relprop.compat.engines import Engines
from relprop.errors import OptionError, TargetError, UnsupportedTopologyError

__all__ = ["DetrGenerator", "GeneratorOurs", "interpret"]


def interpret(
    image: Tensor,
    texts: Tensor,
    model: nn.Module,
    device: Any = None,
    start_layer: int = -1,
    start_layer_text: int = -1,
) -> tuple[Tensor, Tensor]:
    """`CLIP_explainability.ipynb: interpret`, for Hugging Face's CLIPModel.

    Args:
        image: one image for all texts, or one for each. [1 or B, 3, H, W]
        texts: token ids. [B, N]
        device: where to put both; the model's own by default.
        start_layer, start_layer_text: first layers that count; -1 for the last one alone.
    Returns:
        text_relevance [B, N, N], image_relevance [B, patches]
    Raises:
        LayerIndexError: a start layer, where the original ignored all layers in silence.
    """
    device = device or next(model.parameters()).device
    texts = texts.to(device)
    images = image.to(device)
    images = images.repeat(len(texts), 1, 1, 1) if len(images) == 1 else images
    engines = Engines(model.eval())
    given = {"input_ids": texts, "pixel_values": images}
    engine = engines((), given, method="generic_attention", output="logits_per_image", options={"rows": "all"})
    maps = engine.trace(**given).maps
    sites = [site.module for site in engine.program.graph.attention_sites()]
    edges = {site: (maps[site, "gradient"] * maps[site, "attention"])[0].clamp(min=0).mean(1) for site in sites}
    towers = [[edge for site, edge in edges.items() if site.split(".")[0] == name] for name in _towers(sites)]
    image_relevance, text_relevance = (
        _walked(tower, start, name)
        for tower, start, name in zip(
            towers, (start_layer, start_layer_text), ("start_layer", "start_layer_text"), strict=True
        )
    )
    return text_relevance, image_relevance[:, 0, 1:]


def _towers(sites: list[str]) -> tuple[str, str]:
    """The image's and the text's part of the model, by the first part of module paths."""
    names = list(dict.fromkeys(site.split(".")[0] for site in sites))
    vision = [name for name in names if "vision" in name]
    text = [name for name in names if "text" in name]
    if len(names) != 2 or len(vision) != 1 or len(text) != 1:
        raise UnsupportedTopologyError(
            f"interpret: expected a model with attention in vision_model and text_model, got it in {', '.join(names)}"
        )
    return vision[0], text[0]


def _walked(edges: list[Tensor], start: int, name: str) -> Tensor:
    """(I + E) ... (I + E) from a start layer on. [B, N, N]"""
    if not -1 <= start < len(edges):
        raise LayerIndexError(f"{name}: expected -1 or one of {len(edges)} attention layers, got {start}")
    found = torch.eye(edges[0].shape[-1], dtype=edges[0].dtype, device=edges[0].device).expand(len(edges[0]), -1, -1)
    for edge in edges[-1:] if start == -1 else edges[start:]:
        found = found + edge @ found
    return found


class GeneratorOurs:
    """`lxmert/lxmert/src/ExplanationGenerator.py: GeneratorOurs`, for Hugging Face's LxmertForQuestionAnswering.

    Args:
        model_usage: an object with `model` and `forward(input)` as in the original, which calls the model with what it
            makes of the input; or the model itself, whose `input` is then its keyword arguments.
        save_visualization: as in the original, where it has no effect on the answer.
        composite: rules for `use_lrp`.
        backend, precision: as `relprop.compile` takes them.
    """

    def __init__(
        self,
        model_usage: Any,
        save_visualization: bool = False,
        *,
        composite: str = "chefer",
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self.model_usage, self.save_visualization = model_usage, save_visualization
        self.model = model_usage if isinstance(model_usage, nn.Module) else model_usage.model
        self.composite = composite
        self._engines = Engines(self.model.eval(), backend=backend, precision=precision)

    def generate_ours(
        self,
        input: Any,
        index: Any = None,
        use_lrp: bool = True,
        normalize_self_attention: bool = True,
        apply_self_in_rule_10: bool = True,
        method_name: str = "ours",
    ) -> tuple[Tensor, Tensor]:
        """R_t_t [N, N] and R_t_i [N, regions]: relevance of words and of regions for each word; row 0 is the answer's.

        A batch of several has its axis in front. A row without relevance, as of padding, is not divided by its sum of
        zero, where the original stops or gives NaN.

        Raises:
            ClassIndexError, TargetError: the index.
        """
        given = {name: value for name, value in self._arguments(input).items() if value is not None}
        options = {
            "rows": "all",
            "edge": "gradient_x_relevance" if use_lrp else "gradient_x_attention",
            "normalise_between": bool(normalize_self_attention),
            "self_between": bool(apply_self_in_rule_10),
        }
        engine = self._engines(
            (),
            given,
            method="generic_attention",
            composite=self.composite,
            options=options,
            output="question_answering_score",
        )
        found = engine(**given, target=class_score(index)).relevances
        words, regions = found["input_ids"].clone(), found["visual_feats"]
        words[:, 0, 0] = 0
        return alone(words, True), alone(regions, True)

    def _arguments(self, input: Any) -> Mapping[str, Any]:
        """What the model is called with."""
        if self.model_usage is self.model:
            if not isinstance(input, Mapping):
                raise OptionError(f"input: expected the model's keyword arguments, got {type(input).__name__}")
            return input
        calls: list[Mapping[str, Any]] = []
        handle = self.model.register_forward_pre_hook(
            lambda model, args, kwargs: calls.append(bind_arguments(model, args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                self.model_usage.forward(input)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise OptionError(f"model_usage: expected forward to call its model once, got {len(calls)} calls")
        return calls[0]


class DetrGenerator:
    """`DETR/modules/ExplanationGenerator.py: Generator`, for Hugging Face's DetrForObjectDetection.

    Its rules need attention maps of the learned queries among themselves, which no relevance of the image reaches:
    all maps and gradients come from one backward pass of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def generate_ours(
        self,
        img: Tensor,
        target_index: int | Tensor,
        index: Any = None,
        use_lrp: bool = True,
        normalize_self_attention: bool = True,
        apply_self_in_rule_10: bool = True,
    ) -> Tensor:
        """Relevance of positions of the feature map for an object query. [1, B, positions]; [1, B, 1, positions] for a
        query given as a tensor [1]

        Args:
            img: images without padding. [B, 3, H, W]
            target_index: the query.
            index: its class; None for the largest one but the last ("no object").
            use_lrp: expected False: relevance of the queries' own attention is not there.
            normalize_self_attention, apply_self_in_rule_10: as in the original.
        Raises:
            OptionError: `use_lrp`. TargetError, ClassIndexError: query and class.
        """
        if use_lrp:
            raise OptionError("use_lrp: expected False, got True; relevance of queries among themselves is not there")
        query = int(target_index)
        logits, edges = self._edges(img, query, index)
        parts = self.model.get_submodule("model")
        encoders, decoders = len(parts.encoder.layers), len(parts.decoder.layers)  # type: ignore[union-attr, arg-type]
        if len(edges) != encoders + 2 * decoders:
            raise UnsupportedTopologyError(
                f"DETR: expected {encoders} attention layers of the image and {decoders} pairs of the queries, got"
                f" {len(edges)}"
            )
        r_ii = _walked(edges[:encoders], 0, "start_layer")
        r_qq = torch.eye(logits.shape[1], dtype=r_ii.dtype, device=r_ii.device).expand(len(r_ii), -1, -1)
        r_qi = r_ii.new_zeros(len(r_ii), logits.shape[1], r_ii.shape[-1])
        for own, cross in zip(edges[encoders::2], edges[encoders + 1 :: 2], strict=True):
            r_qq, r_qi = r_qq + own @ r_qq, r_qi + own @ r_qi
            gain = cross
            if apply_self_in_rule_10:
                inner, outer = (_bar(r_ii), _bar(r_qq)) if normalize_self_attention else (r_ii, r_qq)
                gain = outer.mT @ (cross @ inner)
            r_qi = r_qi + torch.where(gain.isnan(), 0.0, gain)
        return r_qi[:, target_index][None]

    def _edges(self, img: Tensor, query: int, index: Any) -> tuple[Tensor, list[Tensor]]:
        """The logits, and E of every attention layer in the order of execution. Each [B, Nq, Nk]"""
        with torch.enable_grad(), _AttentionMaps() as kept:
            logits = self.model(img).logits
        if not -logits.shape[1] <= query < logits.shape[1]:
            raise TargetError(f"target_index: expected one of {logits.shape[1]} queries, got {query}")
        score = class_score(index)(logits[:, query, :-1] if index is None else logits[:, query])
        gradients = torch.autograd.grad(score.sum(), kept.maps, allow_unused=True)
        return logits, [
            torch.zeros_like(a).mean(1) if g is None else (a * g).detach().clamp(min=0).mean(1)
            for a, g in zip(kept.maps, gradients, strict=True)
        ]


class _AttentionMaps(TorchFunctionMode):
    """Keeps the attention maps [B, H, Nq, Nk] of a forward pass, as part of its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        found = func(*args, **kwargs)
        return self.keep(found) if getattr(func, "__name__", "") == "softmax" and found.ndim == 4 else found

    def keep(self, found: Tensor) -> Tensor:
        found = found if found.requires_grad else found.requires_grad_()
        self.maps.append(found)
        return found

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        return self.keep(scores.softmax(-1)) @ value


def _bar(matrix: Tensor) -> Tensor:
    """R - I with rows that sum to 1, plus I; a row without relevance is NaN, as in the original."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    rest = matrix - identity
    return rest / rest.sum(-1, keepdim=True) + identity
