"""The interfaces of Chefer, Gur and Wolf's code (CVPR and ICCV 2021), on stock timm and Hugging Face models.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, image = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
>>> from relprop.compat.chefer import LRP
>>> LRP(model).generate_LRP(image, method="transformer_attribution", index=7).shape  # [1, patches]
torch.Size([1, 64])

Shapes are the original's for one sample; a larger batch has its axis in front, and each sample's answer is what it
would be alone. `index` is None for the largest output, a class, or one class per sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relprop.compat.chefer_index import ClassIndexError, alone, check_kind, class_score
from relprop.compat.chefer_multimodal import DetrGenerator, GeneratorBaselines, GeneratorOurs, interpret
from relprop.compat.engines import Engines
from relprop.composites import Composite
from relprop.errors import LayerIndexError, unknown_name
from relprop.explanation import Explanation
from relprop.methods.attention_maps import layer_number

__all__ = [
    "LRP",
    "Baselines",
    "ClassIndexError",
    "DetrGenerator",
    "Generator",
    "GeneratorBaselines",
    "GeneratorOurs",
    "LayerIndexError",
    "generate_relevance",
    "interpret",
]

# Names of `generate_LRP`: the method, and which of its arguments are options there.
_METHODS: dict[str, tuple[str, str | None]] = {
    "transformer_attribution": ("transformer_attribution", "start_layer"),
    "grad": ("transformer_attribution", "start_layer"),
    "rollout": ("relevance_rollout", "start_layer"),
    "full": ("full", None),
    "last_layer": ("last_layer", "is_ablation"),
    "second_layer": ("second_layer", "is_ablation"),
    "last_layer_attn": ("last_layer_attention", None),
}
_WITHOUT_BATCH = ("last_layer", "second_layer", "last_layer_attention")


class LRP:
    """`baselines/ViT/ViT_explanation_generator.py: LRP`.

    Args:
        model: an image classifier; it is put into evaluation mode and not changed otherwise.
        composite: rules; "chefer_original" are those of the authors' earlier file (ViT_orig_LRP).
        backend, precision: as `relprop.compile` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite = "chefer",
        *,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        self.model, self.composite = model.eval(), composite

    def generate_LRP(
        self,
        input: Tensor,
        index: Any = None,
        method: str = "transformer_attribution",
        is_ablation: bool = False,
        start_layer: int = 0,
    ) -> Tensor:
        """Relevance of patches [B, N], class token left out; for "full" of pixels [B, H, W].

        One layer's row ("last_layer", "second_layer", "last_layer_attn") is [N] for one sample. A negative
        `start_layer` counts from the end, -1 for the last layer alone; the original multiplies from there through the
        whole model.

        Raises:
            UnknownNameError: the original returned None for a method it did not know.
            ClassIndexError, TargetError: the index. LayerIndexError: the start layer.
        """
        if not isinstance(method, str) or method not in _METHODS:
            raise unknown_name("method", method, _METHODS)
        name, option = _METHODS[method]
        options: dict[str, Any] = {}
        if option == "start_layer":
            options = {"start_layer": start_layer}
        elif option == "is_ablation":
            options = {"gradient_weighted": bool(is_ablation)}
        found = _explain(self._engines, (input,), {}, index, name, self.composite, options)
        if name == "full":
            return found.relevance
        return alone(_patches(found), name in _WITHOUT_BATCH)


class Baselines:
    """`baselines/ViT/ViT_explanation_generator.py: Baselines`. Arguments as those of `LRP`."""

    def __init__(self, model: nn.Module, *, backend: str = "auto", precision: str = "highest") -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        self.model = model.eval()

    def generate_cam_attn(self, input: Tensor, index: Any = None) -> Tensor:
        """Grad-CAM on the last attention map, in [0, 1]. [h, w], or [B, h, w] for several samples

        A constant map is zero, where the original divides zero by zero.
        """
        found = _explain(self._engines, (input,), {}, index, "attention_gradcam", None, {})
        return alone(found.patches, True)

    def generate_rollout(self, input: Tensor, start_layer: int = 0) -> Tensor:
        """Attention rollout. [B, N]"""
        options = {"start_layer": start_layer}
        return _patches(_explain(self._engines, (input,), {}, None, "attention_rollout", None, options))


def generate_relevance(model: nn.Module, input: Tensor, index: Any = None) -> Tensor:
    """The ICCV 2021 code's relevance of patches for a Vision Transformer. [N], or [B, N] for several samples"""
    return alone(_patches(_explain(Engines(model.eval()), (input,), {}, index, "generic_attention", None, {})), True)


class Generator:
    """`BERT_explainability/modules/BERT/ExplanationGenerator.py: Generator`. All answers are [B, N].

    Args:
        model: a text classifier with a class token in front, called with `input_ids` and `attention_mask`; it is put
            into evaluation mode and not changed otherwise.
        composite: rules of the methods that propagate relevance.
        count_padding: let tokens that `attention_mask` leaves out count where a sample's smallest value is taken or its
            map is averaged and stretched, as the original does; the answer then depends on the longest text of the
            batch.
        backend, precision: as `relprop.compile` takes them.

    Padding itself gets exactly zero.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite = "chefer_bert",
        *,
        count_padding: bool = False,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        check_kind(model, "input_ids", "pixel_values", "relprop.compat.chefer_multimodal.Generator")
        self.model, self.composite, self.count_padding = model.eval(), composite, bool(count_padding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The model's own answer."""
        return self.model(input_ids, attention_mask)

    def generate_LRP(
        self, input_ids: Tensor, attention_mask: Tensor, index: Any = None, start_layer: int = 11
    ) -> Tensor:
        """The paper's method. The class token shows the smallest value, as in the original.

        Raises:
            LayerIndexError: the start layer, which is BERT-base's last one unless it is given.
        """
        options = {"start_layer": start_layer, "normalise": True, "read_tokens": "minimum"}
        counted = {"count_padding": self.count_padding}
        return self._row(input_ids, attention_mask, index, "transformer_attribution", options | counted)

    def generate_LRP_last_layer(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Relevance of the last attention map."""
        return _first_zero(self._row(input_ids, attention_mask, index, "last_layer", {}))

    def generate_full_lrp(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Relevance of each token's embedding."""
        return _first_zero(self._row(input_ids, attention_mask, index, "full", {"at": "tokens"}))

    def generate_attn_last_layer(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """The last attention map itself; the index is not looked at."""
        return _first_zero(self._row(input_ids, attention_mask, None, "last_layer_attention", {}))

    def generate_rollout(
        self, input_ids: Tensor, attention_mask: Tensor, start_layer: int = 0, index: Any = None
    ) -> Tensor:
        """Attention rollout, rows not normalised; the index is not looked at."""
        options = {"start_layer": start_layer, "read_tokens": "zero"}
        return self._row(input_ids, attention_mask, None, "attention_rollout", options)

    def generate_attn_gradcam(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Grad-CAM on the last attention map; a constant one is zero, where the original divides zero by zero."""
        options = {"over": "matrix", "count_padding": self.count_padding}
        return _first_zero(self._row(input_ids, attention_mask, index, "attention_gradcam", options))

    def _row(self, ids: Tensor, mask: Tensor, index: Any, method: str, options: dict[str, Any]) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        return _explain(self._engines, (), given, index, method, self.composite, options).relevance


def _explain(
    engines: Engines,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    index: Any,
    method: str,
    composite: str | Composite | None,
    options: dict[str, Any],
) -> Explanation:
    if "start_layer" in options:
        options = {**options, "start_layer": layer_number("start_layer", options["start_layer"])}
    engine = engines(args, kwargs, method=method, composite=composite, options=options)
    return engine(*args, target=class_score(index), **kwargs)


def _patches(found: Explanation) -> Tensor:
    """Relevance without class and register tokens. [B, N]"""
    kept = [kind not in ("class", "register") for kind in found.token_kinds]
    return found.relevance[..., torch.tensor(kept, device=found.relevance.device)]


def _first_zero(row: Tensor) -> Tensor:
    """The class token shows nothing."""
    row[:, 0] = 0
    return row
