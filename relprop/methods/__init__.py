"""Methods by name. One reverse sweep serves them all; they differ in rules and in what is read out."""

from __future__ import annotations

from functools import partial

from relprop.methods.attention_maps import GradCam, LayerRow, RowWalk
from relprop.methods.base import METHODS, Method, Reading, Requirements, find_method, methods, register_method
from relprop.methods.generic_attention import GenericAttention
from relprop.methods.input_maps import InputMap, PositionedMap
from relprop.methods.sampled import IntegratedGradients, SmoothGrad

_CHEFER = "Chefer et al., CVPR 2021"
_WALK = {"start_layer": 0, "normalise": False, "read_tokens": "kept", "count_padding": False}
_CHANNELS = {"channels": "summed"}
_INPUT = {**_CHANNELS, "rows": "read"}

register_method(
    Method(
        "transformer_attribution",
        "class-specific relevance per token: positive gradient x relevance of every attention map, walked through"
        " the layers",
        f"{_CHEFER}, eq. 13-14",
        "chefer",
        partial(RowWalk, "gradient_x_relevance", "transformer_attribution"),
        _WALK,
    )
)
register_method(
    Method(
        "relevance_rollout",
        "rollout of the attention maps' positive relevance, without gradients",
        f"{_CHEFER}, code (rollout)",
        "chefer",
        partial(RowWalk, "relevance", "relevance_rollout"),
        _WALK,
    )
)
register_method(
    Method(
        "full",
        "relevance of every pixel (or token embedding), propagated down to the input",
        f"{_CHEFER}, code (full)",
        "chefer",
        partial(InputMap, "relevance", "full"),
        {"at": "input", **_INPUT},
        output="input",
    )
)
register_method(
    Method(
        "last_layer",
        "relevance of the last attention map",
        f"{_CHEFER}, code (last_layer)",
        "chefer",
        partial(LayerRow, "relevance", "last_layer", -1),
        {"gradient_weighted": False},
    )
)
register_method(
    Method(
        "second_layer",
        "relevance of the second attention map",
        f"{_CHEFER}, code (second_layer)",
        "chefer",
        partial(LayerRow, "relevance", "second_layer", 1),
        {"gradient_weighted": False},
    )
)
register_method(
    Method(
        "last_layer_attention",
        "the last attention map itself",
        f"{_CHEFER}, code (last_layer_attn)",
        "chefer",
        partial(LayerRow, "attention", "last_layer_attention", -1),
        uses_target=False,
    )
)
register_method(
    Method(
        "raw_attention",
        "one layer's attention map itself, the last by default",
        "common baseline",
        "chefer",
        partial(LayerRow, "attention", "raw_attention"),
        {"layer": -1},
        uses_target=False,
    )
)
register_method(
    Method(
        "attention_rollout",
        "product of all attention maps with the identity added; does not depend on the target",
        "Abnar and Zuidema, ACL 2020",
        "chefer",
        partial(RowWalk, "attention", "attention_rollout"),
        {**_WALK, "normalise": True},
        uses_target=False,
    )
)
register_method(
    Method(
        "attention_gradcam",
        "Grad-CAM on the last attention map",
        f"Selvaraju et al., ICCV 2017; {_CHEFER}, code (cam_attn)",
        "chefer",
        partial(GradCam, "attention_gradcam"),
        {"normalise": True, "over": "row", "count_padding": False},
    )
)
register_method(
    Method(
        "generic_attention",
        "positive gradient x attention of every layer, gathered through the layers and between sequences (two"
        " modalities, encoder and decoder); needs no relevance rules",
        "Chefer, Gur and Wolf, ICCV 2021, eq. 5-11",
        "chefer",
        partial(GenericAttention, "generic_attention"),
        {**_WALK, "normalise_between": True, "self_between": True, "edge": "gradient_x_attention", "rows": "read"},
    )
)
register_method(
    Method(
        "gradient_x_input",
        "gradient times input, summed over channels",
        "Shrikumar et al. 2016",
        "chefer",
        partial(InputMap, "gradient", "gradient_x_input"),
        _INPUT,
        output="input",
    )
)

register_method(
    Method(
        "integrated_gradients",
        "input less baseline, times the gradient's mean on the way from the baseline",
        "Sundararajan et al., ICML 2017",
        "chefer",
        partial(IntegratedGradients, "gradient", "integrated_gradients"),
        {"steps": 32, "baseline": 0.0, "batch": 8, **_CHANNELS},
        output="input",
    )
)
register_method(
    Method(
        "smoothgrad",
        "the gradient's mean over noisy inputs",
        "Smilkov et al. 2017",
        "chefer",
        partial(SmoothGrad, "gradient", "smoothgrad"),
        {"samples": 32, "noise": 0.15, "seed": 0, "times_input": False, "batch": 8, **_CHANNELS},
        output="input",
    )
)
for _name, _summary, _source in (
    ("attnlrp", "relevance of every pixel or token: input times one modified gradient", "Achtibat et al., ICML 2024"),
    ("cp_lrp", "the same with softmax and gates held constant", "Ali et al., ICML 2022"),
    ("reslrp", "attnlrp with well-conditioned residual adds", "Berend et al. 2026"),
    ("libragrad", "input times the gradient balanced by pruning and scaling", "Mehri et al., CVPR 2025"),
):
    register_method(
        Method(_name, _summary, _source, _name, partial(InputMap, "relevance", _name), _INPUT, output="input"),
    )
register_method(
    Method(
        "pa_lrp",
        "attnlrp plus what each token's position is relevant for, added to the token",
        "Bakish et al. 2025",
        "pa_lrp",
        partial(PositionedMap, "relevance", "pa_lrp"),
        {"positions": "added", **_CHANNELS},
        output="input",
    )
)

__all__ = ["METHODS", "Method", "Reading", "Requirements", "find_method", "methods", "register_method"]
