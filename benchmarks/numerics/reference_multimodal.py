"""The authors' own code for two modalities (hila-chefer/Transformer-MM-Explainability), imported from a checkout.

None of it is kept here. Tried with commit 58eaea8. It is only right for one input at a time. Of transformers 3, which
it was written for, what its files import is put in place while they are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMMIT = "58eaea8"
_NEEDED = "DETR/modules/ExplanationGenerator.py"


def found_in(checkout: Path) -> None:
    """Make their modules importable, or raise FileNotFoundError where the folder is no checkout of theirs."""
    if not (checkout / _NEEDED).is_file():
        raise FileNotFoundError(
            f"--multimodal: expected a checkout of Transformer-MM-Explainability with {_NEEDED}, got {checkout}"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))


@contextlib.contextmanager
def precision_of(model: nn.Module) -> Iterator[None]:
    """Tensors that their code makes are of the model's dtype, and stay where they are."""
    before, moved = torch.get_default_dtype(), torch.Tensor.cuda
    torch.set_default_dtype(next(model.parameters()).dtype)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.Tensor.cuda = moved  # type: ignore[method-assign]


class ReferenceDetr(nn.Module):
    """Their DETR's transformer on the features of a stock one.

    Args:
        checkout: folder of their repository.
        model: a DetrForObjectDetection of transformers.
    Raises:
        FileNotFoundError: the folder is no checkout of theirs.
    """

    _NAMES = (
        ("encoder_attn_layer_norm", "norm2"),
        ("self_attn_layer_norm", "norm1"),
        ("encoder_attn", "multihead_attn"),
        ("o_proj", "out_proj"),
        (".mlp", ""),
        ("fc1", "linear1"),
        ("fc2", "linear2"),
        ("decoder.layernorm", "decoder.norm"),
    )

    def __init__(self, checkout: Path, model: Any) -> None:
        super().__init__()
        found_in(checkout)
        package = sys.modules.setdefault("DETR.models", types.ModuleType("DETR.models"))
        package.__path__ = [str(checkout / "DETR" / "models")]  # its __init__ asks for what is not needed here
        layers = importlib.import_module("DETR.modules.layers")
        layers.MultiheadAttention._pre_load_state_dict = staticmethod(lambda *args: None)
        config = model.config
        self.transformer = importlib.import_module("DETR.models.transformer").Transformer(
            config.d_model,
            config.encoder_attention_heads,
            config.encoder_layers,
            config.decoder_layers,
            config.encoder_ffn_dim,
            0.0,
            config.activation_function,
            return_intermediate_dec=True,
        )
        self.class_embed = layers.Linear(config.d_model, config.num_labels + 1)
        self.index_select = layers.IndexSelect()
        self.load_state_dict(self._renamed(model.state_dict()))
        self.to(next(model.parameters()).dtype)
        self.stock = [model]  # not a part
        self.generator = importlib.import_module("DETR.modules.ExplanationGenerator").Generator(self)

    def _renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, weight in weights.items():
            if name.startswith("class_labels_classifier."):
                found["class_embed." + name.rpartition(".")[2]] = weight
            elif name.startswith(("model.encoder.", "model.decoder.")):
                last = "norm3" if "decoder" in name else "norm2"
                for theirs, ours in (*self._NAMES, ("final_layer_norm", last)):
                    name = name.replace(theirs, ours)
                found["transformer." + name.removeprefix("model.")] = weight
        return found

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        model = self.stock[0]
        features, positions = _encoder_inputs(model, image)
        size = (*features.shape[:1], features.shape[2], 1, features.shape[1])
        source, positions = (t.expand_as(features).transpose(1, 2).reshape(size) for t in (features, positions))
        mask = torch.zeros(len(image), 1, size[-1], dtype=torch.bool)
        decoded, memory = self.transformer(source, mask, model.model.query_position_embeddings.weight, positions)
        self.memory_shape = memory.shape
        scores = self.class_embed(decoded)
        return {"pred_logits": self.index_select(scores, 0, torch.tensor(len(scores) - 1))[0]}

    def relprop(self, cam: Tensor, alpha: float, target_index: int, target_class: int) -> Tensor:
        """As in their DETR, whose own forward wants their backbone."""
        cam = torch.zeros_like(self.index_select.Y)
        cam[0, 0, target_index, target_class] = 1
        cam = self.class_embed.relprop(self.index_select.relprop(cam, alpha), alpha)
        return self.transformer.relprop([cam, torch.zeros(self.memory_shape)], alpha)

    def explain(self, images: Tensor, query: int, classes: Tensor, use_lrp: bool) -> Tensor:
        """Relevance of the image's positions for one query, one image after the other. [n, N] float64"""
        answers = []
        with precision_of(self):
            for image, index in zip(images, classes.tolist(), strict=True):
                found = self.generator.generate_ours(image[None], query, index, use_lrp=use_lrp)
                answers.append(found.detach().double().flatten())
        return torch.stack(answers)


def _encoder_inputs(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Features and positions as the stock model's encoder is given them. Each [B or 1, N, C]"""
    given: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given["features"] = args[0] if args else kwargs["hidden_states"]
        given["positions"] = next(v for k, v in kwargs.items() if "position" in k)

    handle = model.model.encoder.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(image)
    finally:
        handle.remove()
    return given["features"], given["positions"]


class ReferenceLxmert:
    """Their LXMERT with the weights of a stock LxmertForQuestionAnswering; arguments as of `ReferenceDetr`."""

    def __init__(self, checkout: Path, model: Any) -> None:
        found_in(checkout)
        with _old_transformers():
            theirs = importlib.import_module("lxmert.lxmert.src.lxmert_lrp").LxmertForQuestionAnswering
            generator = importlib.import_module("lxmert.lxmert.src.ExplanationGenerator").GeneratorOurs
        config = types.SimpleNamespace(**{**model.config.to_dict(), "use_return_dict": True, "return_dict": True})
        self.model = theirs(config)
        missing, unexpected = self.model.load_state_dict(model.state_dict(), strict=False)
        if unexpected or [name for name in missing if "visual_attention_copy" not in name]:
            raise ValueError(f"weights: expected the names of theirs, got {unexpected} and none for {missing}")
        self.model.eval().to(next(model.parameters()).dtype)
        self.generator = generator(self)

    def forward(self, given: Mapping[str, Tensor]) -> Any:
        self.text_len, self.image_boxes_len = given["input_ids"].shape[1], given["visual_feats"].shape[1]
        return self.model(**given)

    def explain(self, given: Mapping[str, Tensor], answers: Tensor, use_lrp: bool) -> Tensor:
        """R_t_i, one input after the other. [n, N * M] float64"""
        found = []
        with precision_of(self.model):
            for i, index in enumerate(answers.tolist()):
                one = {name: value[i : i + 1] for name, value in given.items()}
                found.append(self.generator.generate_ours(one, index, use_lrp=use_lrp)[1].detach().double().flatten())
        return torch.stack(found)


@contextlib.contextmanager
def _old_transformers() -> Iterator[None]:
    """What their LXMERT imports, under the names of transformers 3."""
    transformers: Any = importlib.import_module("transformers")
    nothing = lambda *args, **kwargs: lambda function: function  # noqa: E731

    class Base(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def init_weights(self) -> None: ...

        @property
        def dtype(self) -> torch.dtype:
            return next(self.parameters()).dtype

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

    names = ("code_sample_docstrings", "start_docstrings", "start_docstrings_to_model_forward")
    outputs = importlib.import_module("transformers.utils").ModelOutput
    documented = {f"add_{name}": nothing for name in names}
    parts: dict[str, dict[str, Any]] = {
        "file_utils": {"ModelOutput": outputs, "replace_return_docstrings": nothing, **documented},
        "modeling_utils": {"PreTrainedModel": Base},
        "configuration_lxmert": {"LxmertConfig": transformers.LxmertConfig},
    }
    before = {f"transformers.{name}": sys.modules.get(f"transformers.{name}") for name in parts}
    for name, holds in parts.items():
        sys.modules[f"transformers.{name}"] = types.ModuleType(name)
        vars(sys.modules[f"transformers.{name}"]).update(holds)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class ReferenceClip:
    """Their CLIP with the weights of a stock CLIPModel, whose vision heads have 64 channels, as theirs always have.

    Their norms compute in float32; in a float64 model they compute in float64 here.
    """

    def __init__(self, checkout: Path, model: Any) -> None:
        found_in(checkout)
        for name in ("CLIP", "CLIP.clip"):  # their package asks for a tokenizer that is not needed here
            package = sys.modules.setdefault(name, types.ModuleType(name))
            package.__path__ = [str(checkout / name.replace(".", "/"))]
        theirs = importlib.import_module("CLIP.clip.model")
        theirs.LayerNorm.forward = nn.LayerNorm.forward
        vision, text = model.config.vision_config, model.config.text_config
        self.model = theirs.CLIP(
            model.config.projection_dim,
            vision.image_size,
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.patch_size,
            text.max_position_embeddings,
            text.vocab_size,
            text.hidden_size,
            text.num_attention_heads,
            text.num_hidden_layers,
        )
        self.model.load_state_dict(_clip_weights(model.state_dict()))
        self.model.eval().to(next(model.parameters()).dtype)
        cells = json.loads((checkout / "CLIP_explainability.ipynb").read_text())["cells"]
        lines = next("".join(c["source"]) for c in cells if "def interpret" in "".join(c["source"]))
        space = {"torch": torch, "np": importlib.import_module("numpy"), "start_layer": 0, "start_layer_text": 0}
        exec(lines, space)  # the function is in a notebook
        self.interpret: Any = space["interpret"]

    def explain(self, images: Tensor, texts: Tensor) -> Tensor:
        """Relevance of the patches from all layers on, one pair after the other. [n, N] float64"""
        answers = []
        with precision_of(self.model):
            for image, words in zip(images, texts, strict=True):
                found = self.interpret(image[None], words[None], self.model, "cpu", 0, 0)[1]
                answers.append(found.detach().double().flatten())
        return torch.stack(answers)


def _clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names; queries, keys and values as one weight."""
    found: dict[str, Tensor] = {}
    single = {
        "logit_scale": "logit_scale",
        "text_projection.weight": "text_projection",
        "visual_projection.weight": "visual.proj",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    parts = (
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    for name, weight in weights.items():
        if name in single:
            found[single[name]] = weight.T if "projection" in name else weight
        elif ".self_attn.q_proj." in name:
            stacked = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            found[_renamed(name, parts)] = stacked
        elif not any(part in name for part in ("k_proj", "v_proj", "position_ids")):
            found[_renamed(name, parts)] = weight
    return found


def _renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in parts:
        name = name.replace(ours, theirs)
    return name
