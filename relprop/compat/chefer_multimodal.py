"""The interfaces of Transformer-MM-Explainability (ICCV 2021) for two modalities, on stock Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from relprop.capture.export import bind_arguments
from relprop.compat.chefer_index import Queries, alone, check_kind, class_score
from relprop.compat.engines import Engines
from relprop.composites import Composite
from relprop.engine import Engine
from relprop.errors import DTypeError, LayerIndexError, OptionError, ShapeError, UnsupportedTopologyError
from relprop.latents import Paths
from relprop.methods.attention_maps import layer_number

__all__ = ["DetrGenerator", "Generator", "GeneratorBaselines", "GeneratorOurs", "interpret"]


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
        LayerIndexError: a start layer, where the original ignored all layers in silence. ShapeError, DTypeError:
            images or texts of another shape or kind, or of numbers that do not go together.
    """
    _check_images("image", image)
    _check_texts(texts, len(image))
    device = device or next(model.parameters()).device
    texts = texts.to(device)
    images = image.to(device)
    images = images.repeat(len(texts), 1, 1, 1) if len(images) == 1 else images
    engines = Engines(model.eval())
    given = {"input_ids": texts, "pixel_values": images}
    engine = engines((), given, method="generic_attention", output="logits_per_image", options={"rows": "all"})
    edges = {site: _positive(maps, "attention") for site, maps in _traced(engine, given, None)}
    towers = [[edge for site, edge in edges.items() if site.split(".")[0] == name] for name in _towers(list(edges))]
    image_relevance, text_relevance = (
        _walked(tower, start, name)
        for tower, start, name in zip(
            towers, (start_layer, start_layer_text), ("start_layer", "start_layer_text"), strict=True
        )
    )
    return text_relevance, image_relevance[:, 0, 1:]


def _check_images(name: str, given: Any) -> None:
    if not isinstance(given, Tensor) or given.ndim != 4:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(f"{name}: expected a tensor of images [B, 3, H, W], got {got}")
    if not given.is_floating_point():
        raise DTypeError(f"{name}: expected images as the model takes them, floating, got {given.dtype}")


def _check_texts(texts: Any, images: int) -> None:
    if not isinstance(texts, Tensor) or texts.ndim != 2:
        got = list(texts.shape) if isinstance(texts, Tensor) else type(texts).__name__
        raise ShapeError(f"texts: expected a tensor of token ids [B, N], got {got}")
    if texts.is_floating_point():
        raise DTypeError(f"texts: expected token ids, integers, got {texts.dtype}")
    if images not in (1, len(texts)):
        raise ShapeError(f"image: expected one image, or one for each of {len(texts)} texts, got {images}")


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
    start = layer_number(name, start)
    if not -1 <= start < len(edges):
        raise LayerIndexError(f"{name}: expected -1 or one of {len(edges)} attention layers, got {start}")
    found = torch.eye(edges[0].shape[-1], dtype=edges[0].dtype, device=edges[0].device).expand(len(edges[0]), -1, -1)
    for edge in edges[-1:] if start == -1 else edges[start:]:
        found = found + edge @ found
    return found


class _LxmertGenerator:
    """What the generators for LXMERT share; arguments as those of `GeneratorOurs`."""

    def __init__(
        self,
        model_usage: Any,
        save_visualization: bool = False,
        *,
        composite: str | Composite = "chefer",
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self.model_usage, self.save_visualization = model_usage, save_visualization
        self.model = model_usage if isinstance(model_usage, nn.Module) else model_usage.model
        self.composite = composite
        self._engines = Engines(self.model.eval(), backend=backend, precision=precision)

    def _compiled(self, input: Any, **options: Any) -> tuple[Engine, dict[str, Any]]:
        """The engine of the generic method with these options, and what the model is called with."""
        given = {name: value for name, value in self._arguments(input).items() if value is not None}
        engine = self._engines(
            (),
            given,
            method="generic_attention",
            composite=self.composite,
            options={"rows": "all", **options},
            output="question_answering_score",
        )
        return engine, given

    def _arguments(self, input: Any) -> Mapping[str, Any]:
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


class GeneratorOurs(_LxmertGenerator):
    """`lxmert/lxmert/src/ExplanationGenerator.py: GeneratorOurs`, for Hugging Face's LxmertForQuestionAnswering.

    Args:
        model_usage: an object with `model` and `forward(input)` as in the original, which calls the model with what it
            makes of the input; or the model itself, whose `input` is then its keyword arguments.
        save_visualization: as in the original, where it has no effect on the answer.
        composite: rules for `use_lrp`.
        backend, precision: as `relprop.compile` takes them.
    Attributes:
        R_t_t, R_t_i, R_i_i, R_i_t: of the last call, as the original keeps them.
    """

    R_t_t: Tensor
    R_t_i: Tensor
    R_i_i: Tensor
    R_i_t: Tensor

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
        engine, given = self._compiled(
            input,
            edge="gradient_x_relevance" if use_lrp else "gradient_x_attention",
            normalise_between=bool(normalize_self_attention),
            self_between=bool(apply_self_in_rule_10),
        )
        found = engine(**given, target=class_score(index)).matrices
        words, regions = _sequences(found)
        self.R_t_t, self.R_t_i = _answer(found[words, words], found[words, regions])
        self.R_i_i = alone(found[regions, regions], True)
        seen = found.get((regions, words))  # by no region where one layer alone lies between them: its last is skipped
        self.R_i_t = torch.zeros_like(self.R_t_i.mT) if seen is None else alone(seen, True)
        return self.R_t_t, self.R_t_i


def _sequences(found: Mapping[tuple[str, str], Tensor]) -> tuple[str, str]:
    """The inputs whose tokens are LXMERT's words and regions."""
    for words in ("input_ids", "inputs_embeds"):
        if (words, "visual_feats") in found:
            return words, "visual_feats"
    got = ", ".join(f"{column} for {row}" for row, column in found)
    raise UnsupportedTopologyError(
        f"LXMERT: expected relevance of visual_feats for input_ids or inputs_embeds, got it of {got or 'nothing'}"
    )


class GeneratorBaselines(_LxmertGenerator):
    """`lxmert/lxmert/src/ExplanationGenerator.py: GeneratorBaselines`; arguments as those of `GeneratorOurs`.

    Args:
        count_padding: let padded words and regions count where maps are averaged, stretched or multiplied, as the
            original does; the answer then depends on the longest question of the batch.

    Every method gives R_t_t [N, N] and R_t_i [N, regions], with a batch's axis in front for several samples. All raise
    ClassIndexError or TargetError for the index.
    """

    def __init__(self, *args: Any, count_padding: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count_padding = bool(count_padding)

    def generate_transformer_attr(
        self, input: Any, index: Any = None, method_name: str = "transformer_attr"
    ) -> tuple[Tensor, Tensor]:
        """Positive gradient x relevance: walked through the layers of the words, and of the last layer between."""
        layers = self._layers(input, index, "gradient_x_relevance")
        words = _walked([_positive(maps, "relevance") for maps in layers.words], 0, "start_layer")
        return _answer(words, _positive(layers.between, "relevance"))

    def generate_partial_lrp(
        self, input: Any, index: Any = None, method_name: str = "partial_lrp"
    ) -> tuple[Tensor, Tensor]:
        """Relevance of the last layers' attention maps, each stretched to [0, 1]; zero where it is constant."""
        layers = self._layers(input, index, "relevance")
        return _answer(*(_stretched(maps) for maps in (layers.words[-1], layers.between)))

    def generate_raw_attn(self, input: Any, method_name: str = "raw_attention") -> tuple[Tensor, Tensor]:
        """The last layers' attention maps themselves."""
        layers = self._layers(input, None, "attention")
        return _answer(*(maps["attention"].mean(1) for maps in (layers.words[-1], layers.between)))

    def generate_attn_gradcam(
        self, input: Any, index: Any = None, method_name: str = "gradcam"
    ) -> tuple[Tensor, Tensor]:
        """Grad-CAM on the last layers' attention maps."""
        layers = self._layers(input, index, "gradient_x_attention")
        return _answer(*(_gradcam(maps) for maps in (layers.words[-1], layers.between)))

    def generate_rollout(self, input: Any, method_name: str = "rollout") -> tuple[Tensor, Tensor]:
        """Rollout of the words' layers; between the sequences through the last layer, without the words' last."""
        layers = self._layers(input, None, "attention")
        words = [maps["attention"].mean(1) for maps in layers.words]
        regions = _rollout([maps["attention"].mean(1) for maps in layers.regions])
        between = _rollout(words[:-1]).mT @ (layers.between["attention"].mean(1) @ regions)
        return _answer(_rollout(words), between)

    def _layers(self, input: Any, index: Any, edge: str) -> _Layers:
        """The maps that an edge is made of."""
        engine, given = self._compiled(input, edge=edge)
        found = _traced(engine, given, class_score(index))
        words = [maps for site, maps in found if ".encoder.layer." in site or ".lang_self_att." in site]
        regions = [maps for site, maps in found if ".r_layers." in site or ".visn_self_att." in site]
        both = [(site, maps) for site, maps in found if ".visual_attention." in site]
        between = [maps for site, maps in both if not site.endswith("@1")]  # of a layer's two calls words come first
        if not words or not regions or not between:
            raise UnsupportedTopologyError(
                "LXMERT: expected attention layers among words, among regions and between them, got"
                f" {', '.join(site for site, _ in found) or 'none'}"
            )
        if self.count_padding:
            return _Layers(words, regions, between[-1])
        word = _unpadded(given.get("attention_mask"), words[0])
        region = _unpadded(given.get("visual_attention_mask"), regions[0])
        return _Layers(
            [_without_padding(maps, word, word) for maps in words],
            [_without_padding(maps, region, region) for maps in regions],
            _without_padding(between[-1], word, region),
        )


# Of one layer attention, gradient or relevance, each [B, H, Nq, Nk], and the entries that count, [B, 1, Nq, Nk].
_Maps: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class _Layers:
    """LXMERT's attention in the order of execution; `between` is the last layer from words to regions."""

    words: list[_Maps]
    regions: list[_Maps]
    between: _Maps


def _traced(engine: Engine, given: Mapping[str, Any], target: Any) -> list[tuple[str, _Maps]]:
    """Attention layers in the order of execution, by path, with the maps that the engine's edge is made of."""
    maps = engine.trace(**given, target=target).maps
    graph = engine.program.graph
    sites = dict.fromkeys(map(Paths(graph).own, graph.attention_sites()))
    return [(site, {name: found[0] for (of, name), found in maps.items() if of == site}) for site in sites]


def _unpadded(mask: Tensor | None, maps: _Maps) -> Tensor:
    """Tokens that are no padding, of maps among them. [B, N]"""
    some = next(iter(maps.values()))
    return some.new_ones(len(some), some.shape[-1], dtype=torch.bool) if mask is None else mask.bool()


def _without_padding(maps: _Maps, queries: Tensor, keys: Tensor) -> _Maps:
    """Maps that are zero where a query or a key is padding."""
    counted = queries[:, None, :, None] & keys[:, None, None, :]
    return {**{name: torch.where(counted, found, 0.0) for name, found in maps.items()}, "counted": counted}


def _answer(words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """R_t_t, whose class token shows nothing of itself, and R_t_i."""
    words[:, 0, 0] = 0
    return alone(words, True), alone(regions, True)


def _positive(maps: _Maps, what: str) -> Tensor:
    """Mean over heads of the positive part of gradient x attention or relevance. [B, Nq, Nk]"""
    return (maps["gradient"] * maps[what]).clamp(min=0).mean(1)


def _gradcam(maps: _Maps) -> Tensor:
    """Attention with heads weighted by their mean gradient, cut at zero. [B, Nq, Nk]"""
    gradient = maps["gradient"]
    number = maps.get("counted", torch.ones_like(gradient, dtype=torch.bool)).sum((-2, -1), keepdim=True)
    weight = gradient.sum((-2, -1), keepdim=True) / number
    return (maps["attention"] * weight).mean(1).clamp(min=0)


def _stretched(maps: _Maps) -> Tensor:
    """Each sample's relevance, its mean over heads, stretched to [0, 1]. [B, Nq, Nk]"""
    matrix = maps["relevance"].mean(1)
    counted = maps["counted"][:, 0] if "counted" in maps else torch.ones_like(matrix, dtype=torch.bool)
    low = torch.where(counted, matrix, torch.inf).amin((-2, -1), keepdim=True)
    high = torch.where(counted, matrix, -torch.inf).amax((-2, -1), keepdim=True)
    return torch.where(counted, (matrix - low) / torch.where(high > low, high - low, 1.0), 0.0)


def _rollout(edges: list[Tensor]) -> Tensor:
    """The product of I + A with rows divided by their sums. [B, N, N]"""
    identity = torch.eye(edges[0].shape[-1], dtype=edges[0].dtype, device=edges[0].device)
    found = identity.expand_as(edges[0])
    for edge in edges:
        found = (edge + identity) / (edge + identity).sum(-1, keepdim=True) @ found
    return found


_Query: TypeAlias = "int | Tensor | Sequence[int]"


def _queries(img: Any, target_index: _Query) -> Queries:
    _check_images("img", img)
    return Queries.of(target_index, len(img))


class DetrGenerator:
    """`DETR/modules/ExplanationGenerator.py: Generator`, for Hugging Face's DetrForObjectDetection.

    Every method explains one object query of each image and gives relevance of positions of the feature map: [1, B,
    positions], or [1, B, 1, positions] for a query given as a tensor [1], or queries as a tensor or list [B].

    Args:
        model: put into evaluation mode, and not changed otherwise.
        composite: rules of the methods that propagate relevance. The default also scales what each linear layer passes
            on to what arrived, as the original does.
        backend, precision: as `relprop.compile` takes them.
    Attributes:
        R_i_i, R_q_q, R_q_i: of the last `generate_ours`, as the original keeps them. Each [N, M], of several images
            [B, N, M].

    Every method takes images without padding [B, 3, H, W], a query for all of them or one for each and, where the
    answer depends on it, the query's class (None for the largest one but the last, "no object") likewise, and raises
    TargetError and ClassIndexError for these, ShapeError and DTypeError for images.
    """

    R_i_i: Tensor
    R_q_q: Tensor
    R_q_i: Tensor

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite = "chefer_detr",
        *,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        check_kind(model, "pixel_values", "input_ids", "relprop.compat.chefer.Generator")
        self.model, self.composite = model.eval(), composite

    def generate_ours(
        self,
        img: Tensor,
        target_index: _Query,
        index: Any = None,
        use_lrp: bool = True,
        normalize_self_attention: bool = True,
        apply_self_in_rule_10: bool = True,
    ) -> Tensor:
        """The paper's rules; with `use_lrp` attention maps are replaced by their relevance."""
        queries = _queries(img, target_index)
        layers = self._relevance(img, queries, index) if use_lrp else self._attention(img, queries, index)
        edges = [_positive(maps, "relevance" if use_lrp else "attention") for maps in layers]
        image, own, between = self._parts(edges)
        r_ii = _walked(image, 0, "start_layer")
        r_qq = torch.eye(own[0].shape[-1], dtype=r_ii.dtype, device=r_ii.device).expand(len(r_ii), -1, -1)
        r_qi = r_ii.new_zeros(len(r_ii), r_qq.shape[-1], r_ii.shape[-1])
        for among, cross in zip(own, between, strict=True):
            r_qq, r_qi = r_qq + among @ r_qq, r_qi + among @ r_qi
            gain = cross
            if apply_self_in_rule_10:
                inner, outer = (_bar(r_ii), _bar(r_qq)) if normalize_self_attention else (r_ii, r_qq)
                gain = outer.mT @ (cross @ inner)
            r_qi = r_qi + torch.where(gain.isnan(), 0.0, gain)
        self.R_i_i, self.R_q_q, self.R_q_i = (alone(found, True) for found in (r_ii, r_qq, r_qi))
        return queries.rows(r_qi)

    def generate_transformer_att(self, img: Tensor, target_index: _Query, index: Any = None) -> Tensor:
        """Positive gradient x relevance of the last attention map between queries and image."""
        queries = _queries(img, target_index)
        return queries.rows(_positive(self._relevance(img, queries, index)[-1], "relevance"))

    def generate_partial_lrp(self, img: Tensor, target_index: _Query, index: Any = None) -> Tensor:
        """Relevance of the last attention map between queries and image, stretched to [0, 1] over all queries."""
        queries = _queries(img, target_index)
        return queries.rows(_stretched(self._relevance(img, queries, index)[-1]))

    def generate_raw_attn(self, img: Tensor, target_index: _Query) -> Tensor:
        """The last attention map between queries and image itself."""
        queries = _queries(img, target_index)
        return queries.rows(self._attention(img, queries)[-1]["attention"].mean(1))

    def generate_rollout(self, img: Tensor, target_index: _Query) -> Tensor:
        """Rollout within the image and among the queries, and the last attention map between them."""
        queries = _queries(img, target_index)
        layers = [maps["attention"].mean(1) for maps in self._attention(img, queries)]
        image, own, between = self._parts(layers)
        return queries.rows(_rollout(own).mT @ (between[-1] @ _rollout(image)))

    def generate_attn_gradcam(self, img: Tensor, target_index: _Query, index: Any = None) -> Tensor:
        """Grad-CAM on the last attention map between queries and image."""
        queries = _queries(img, target_index)
        return queries.rows(_gradcam(self._attention(img, queries, index)[-1]))

    def _parts(self, edges: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of layers in the order of execution those within the image, among queries, and between the two."""
        model = self.model.get_submodule("model")
        encoders, decoders = len(model.encoder.layers), len(model.decoder.layers)  # type: ignore[union-attr, arg-type]
        if len(edges) != encoders + 2 * decoders:
            raise UnsupportedTopologyError(
                f"DETR: expected {encoders} attention layers of the image and {decoders} pairs of the queries, got"
                f" {len(edges)} (one less where transformers' DETR ignores decoder_inputs_embeds)"
            )
        return edges[:encoders], edges[encoders::2], edges[encoders + 1 :: 2]

    def _attention(self, img: Tensor, queries: Queries, index: Any = None) -> list[_Maps]:
        """Attention and its gradient of every layer in the order of execution, from the model's own backward pass.

        So the queries' first attention among themselves is there, which no relevance of the image reaches.
        """
        with torch.enable_grad(), _AttentionMaps() as kept:
            logits = self.model(img).logits
        score = queries.score(index)(logits)
        gradients = torch.autograd.grad(score.sum(), kept.maps, allow_unused=True)
        return [
            {"attention": found.detach(), "gradient": torch.zeros_like(found) if gradient is None else gradient}
            for found, gradient in zip(kept.maps, gradients, strict=True)
        ]

    def _relevance(self, img: Tensor, queries: Queries, index: Any) -> list[_Maps]:
        """Relevance and gradient of every attention map in the order of execution.

        The queries start from zeros that are given as an input, so that relevance is followed down to them.
        """
        sizes = self.model.config
        zeros = img.new_zeros(len(img), sizes.num_queries, sizes.d_model)  # type: ignore[union-attr, arg-type]
        given = {"pixel_values": img, "decoder_inputs_embeds": zeros}
        options = {"rows": "all", "edge": "gradient_x_relevance"}
        engine = self._engines(
            (), given, method="generic_attention", composite=self.composite, options=options, output="logits"
        )
        return [maps for _, maps in _traced(engine, given, queries.score(index)) if "relevance" in maps]


Generator = DetrGenerator  # its name in the original, where every kind of model has a module of its own


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
