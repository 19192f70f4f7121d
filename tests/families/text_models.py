"""Stock transformers classes, built small with random weights, and how each is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.families.catalogue import OF_ONE_SEQUENCE, Row, methods_cell

VOCABULARY = 100
IMAGE_TOKEN = VOCABULARY - 1
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One stock class.

    Attributes:
        title: first cell of its row in the README.
        config, model: class names in transformers.
        sizes: arguments of the config.
        inputs: (batch, length, generator) -> the model's arguments.
        target: length -> an index into one sample's output.
        output: which output is explained, None for the logits.
        entries: explained inputs by their names in the explanation.
        refusal: where methods that walk through attention layers do not apply, words of the refusal.
        also_refuses: other methods that do not apply.
        why: words of the refusals for the README.
        apart: where methods that walk do not apply, whether its sequences stay apart, for generic_attention.
        fixed: the captured length is the only one.
        pads: whether text may be padded and masked.
        kept_after_text: how many tokens of another kind follow the text in the sequence.
        quick: whether it is among the few of `make test`.
        tolerance: relative, in float64; looser where the model itself computes in float32.
        settings: attributes of the config that its constructor does not take.
        uncaptured: where torch.export cannot capture the class, words of the refusal.
        before_5: the same for transformers 4, or "skipped".
        full: arguments of the config for the published size, for benchmarks/families.py; None where none is built.
        full_inputs: (batch, length, generator) -> the arguments of that model, where they are other sizes than above.
        cut: how many layers the published model has, where fewer are built.
    """

    title: str
    config: str
    model: str
    sizes: dict[str, Any]
    inputs: Callable[[int, int, torch.Generator], Inputs]
    target: Callable[[int], Any]
    output: str | None = None
    entries: tuple[str, ...] = ("input_ids",)
    refusal: str = ""
    also_refuses: frozenset[str] = frozenset()
    why: str = "two sequences of tokens"
    apart: bool = True
    fixed: bool = False
    pads: bool = True
    kept_after_text: int = 0
    quick: bool = False
    tolerance: float = 1e-9
    settings: dict[str, Any] = field(default_factory=dict)
    uncaptured: str = ""
    before_5: str = ""
    full: dict[str, Any] | None = None
    full_inputs: Callable[[int, int, torch.Generator], Inputs] | None = None
    cut: int = 0

    @property
    def row(self) -> Row:
        """Of the README's table."""
        methods = f"refused: {self.why}" if self.uncaptured else methods_cell(self.refuses, self.why)
        return Row(self.title, f"transformers.{self.model}", methods)

    @property
    def refuses(self) -> frozenset[str]:
        """The methods that do not apply, each by an error that says so."""
        several = frozenset({"pa_lrp"} if len(self.entries) > 1 else ())
        walks = OF_ONE_SEQUENCE if self.refusal else frozenset()
        return several | walks | self.also_refuses | (frozenset() if self.apart else {"generic_attention"})


def ids(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def ones(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def encoder(batch: int, length: int, generator: torch.Generator) -> Inputs:
    return {"input_ids": ids(batch, length, generator), "attention_mask": ones(batch, length)}


def decoder(batch: int, length: int, generator: torch.Generator) -> Inputs:
    return {**encoder(batch, length, generator), "use_cache": False}


def both(batch: int, length: int, generator: torch.Generator) -> Inputs:
    target = ids(batch, 5, generator)
    return {**encoder(batch, length, generator), "decoder_input_ids": target, "use_cache": False}


def images(batch: int, generator: torch.Generator, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=generator)


def pair(batch: int, length: int, generator: torch.Generator, size: int = 32) -> Inputs:
    given = encoder(batch, length, generator)
    given["input_ids"][:, -1] = VOCABULARY - 1  # CLIP reads the row of the largest id
    return {**given, "pixel_values": images(batch, generator, size)}


def lxmert(batch: int, length: int, generator: torch.Generator, regions: int = 6, features: int = 20) -> Inputs:
    boxes = torch.rand(batch, regions, 4, generator=generator)
    return {
        **encoder(batch, length, generator),
        "visual_feats": torch.randn(batch, regions, features, generator=generator),
        "visual_pos": boxes,
    }


def visual_bert(batch: int, length: int, generator: torch.Generator, regions: int = 6, features: int = 20) -> Inputs:
    return {
        **encoder(batch, length, generator),
        "visual_embeds": torch.randn(batch, regions, features, generator=generator),
        "visual_attention_mask": ones(batch, regions),
    }


def picture_and_text(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Four image tokens, one per patch, before the text."""
    given = decoder(batch, length, generator)
    given["input_ids"].clamp_(max=IMAGE_TOKEN - 1)[:, :4] = IMAGE_TOKEN
    return {**given, "pixel_values": images(batch, generator, 16)}


def prefix(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """PaliGemma sees all of a prefix from all of it."""
    given = picture_and_text(batch, length, generator)
    return {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}


def patches_and_text(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Qwen2-VL takes the patches of all images in one row, 2 x 2 of them to a token."""
    given = picture_and_text(batch, length, generator)
    return {
        **given,
        "pixel_values": torch.randn(batch * 16, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "mm_token_type_ids": (given["input_ids"] == IMAGE_TOKEN).long(),
    }


def detection(batch: int, length: int, generator: torch.Generator, size: int = 64) -> Inputs:
    return {"pixel_values": images(batch, generator, size)}


def first_class(length: int) -> Any:
    return 1


def last_token(length: int) -> Any:
    return (length - 1, 7)


BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
PICTURE = {**TOWER, "image_size": 16, "patch_size": 8}
DECODER = {**TOWER, "vocab_size": VOCABULARY, "num_key_value_heads": 2}

VALUES = "a branch or a size depends on the values of a tensor"

DEBERTA = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WIDE = {"hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B = {**WIDE, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64}
LLAMA_1B |= {"vocab_size": 128256, "tie_word_embeddings": True}
QWEN3_600M = {**WIDE, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128}
QWEN3_600M |= {"intermediate_size": 3072, "tie_word_embeddings": True}
GEMMA3_1B = {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
GEMMA3_1B |= {"intermediate_size": 6912, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        "BERT",
        "BertConfig",
        "BertForSequenceClassification",
        BERT,
        encoder,
        first_class,
        quick=True,
        full={},
    ),
    "roberta": Family(
        "RoBERTa",
        "RobertaConfig",
        "RobertaForSequenceClassification",
        BERT,
        encoder,
        first_class,
        full={},
    ),
    "distilbert": Family(
        "DistilBERT",
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
        encoder,
        first_class,
        full={},
    ),
    "deberta_v3": Family(
        "DeBERTa v3 (disentangled attention)",
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {
            **BERT,
            **DEBERTA,
            "position_buckets": 8,
            "max_position_embeddings": 32,
        },
        encoder,
        first_class,
        full={**BASE, **DEBERTA, "position_buckets": 256, "vocab_size": 128100},
    ),
    "modernbert": Family(
        "ModernBERT (RoPE, local attention)",
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {**BERT, "num_hidden_layers": 3, "local_attention": 8, "pad_token_id": 0, "global_attn_every_n_layers": 3},
        encoder,
        first_class,
        tolerance=1e-5,
        full={},
    ),
    "gpt2": Family(
        "GPT-2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
        decoder,
        last_token,
        full={},
    ),
    "llama": Family(
        "Llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        LLAMA,
        decoder,
        last_token,
        tolerance=1e-5,
        full=LLAMA_1B,
    ),
    "mistral": Family(
        "Mistral (sliding window)",
        "MistralConfig",
        "MistralForCausalLM",
        {**LLAMA, "sliding_window": 4},
        decoder,
        last_token,
        tolerance=1e-5,
        full={**WIDE, "intermediate_size": 14336},
        cut=32,
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**LLAMA, "head_dim": 12},
        decoder,
        last_token,
        tolerance=1e-5,
        full=QWEN3_600M,
    ),
    "gemma3": Family(
        "Gemma 3 (soft-capping, sliding window)",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **LLAMA,
            "head_dim": 12,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 12,
        },
        decoder,
        last_token,
        tolerance=1e-5,
        full=GEMMA3_1B,
    ),
    "mixtral": Family(
        "Mixtral (experts as `batched_mm`)",
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        decoder,
        last_token,
        tolerance=1e-5,
        settings={"_experts_implementation": "batched_mm"},
        before_5=VALUES,
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE (experts as `batched_mm`)",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **LLAMA,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
        decoder,
        last_token,
        tolerance=1e-5,
        settings={"_experts_implementation": "batched_mm"},
        before_5=VALUES,
    ),
    "t5": Family(
        "T5",
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        both,
        lambda length: (4, 7),
        entries=("input_ids", "decoder_input_ids"),
        refusal="tokens of one sequence|none that torch.export shows as attention",
        tolerance=1e-5,
        full={"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
    ),
    "bart": Family(
        "BART",
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 64,
        },
        both,
        lambda length: (4, 7),
        entries=("input_ids", "decoder_input_ids"),
        refusal="tokens of one sequence",
        full={
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
        },
    ),
    "clip": Family(
        "CLIP, image and text",
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**TOWER, "vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 0},
            "vision_config": VISION,
            "projection_dim": 32,
        },
        pair,
        lambda length: None,
        output="logits_per_text",
        entries=("input_ids", "pixel_values"),
        before_5="skipped",  # its mask overflows in float64
        refusal="tokens of one sequence",
        full={"text_config": {"eos_token_id": 2, "bos_token_id": 0}},
        full_inputs=partial(pair, size=224),
    ),
    "siglip_pair": Family(
        "SigLIP, image and text",
        "SiglipConfig",
        "SiglipModel",
        {"text_config": {**TOWER, "vocab_size": VOCABULARY}, "vision_config": VISION},
        pair,
        lambda length: None,
        output="logits_per_text",
        entries=("input_ids", "pixel_values"),
        refusal="tokens of one sequence",
        pads=False,  # it reads the last token, padding or not
        full={},
        full_inputs=partial(pair, size=224),
    ),
    "lxmert": Family(
        "LXMERT (VQA)",
        "LxmertConfig",
        "LxmertForQuestionAnswering",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "l_layers": 2,
            "x_layers": 1,
            "r_layers": 1,
            "visual_feat_dim": 20,
            "num_qa_labels": 5,
        },
        lxmert,
        first_class,
        output="question_answering_score",
        entries=("input_ids", "visual_feats", "visual_pos"),
        refusal="tokens of one sequence",
        full={},
        full_inputs=partial(lxmert, regions=36, features=2048),
    ),
    "visual_bert": Family(
        "VisualBERT (VQA)",
        "VisualBertConfig",
        "VisualBertForQuestionAnswering",
        {**BERT, "visual_embedding_dim": 20, "num_labels": 5},
        visual_bert,
        first_class,
        kept_after_text=6,
        entries=("input_ids", "visual_embeds"),
        why="positions of two inputs",
        full={"visual_embedding_dim": 2048, "num_labels": 3129},
        full_inputs=partial(visual_bert, regions=36, features=2048),
    ),
    "paligemma": Family(
        "PaliGemma (image tokens in a text)",
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**PICTURE, "model_type": "siglip_vision_model", "projection_dim": 48},
            "text_config": {**DECODER, "head_dim": 12, "model_type": "gemma"},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": 48,
        },
        prefix,
        last_token,
        entries=("input_ids", "pixel_values"),
        refusal="tokens of one sequence",
        apart=False,
        why="image tokens within a text",
        tolerance=1e-5,
        before_5=VALUES,
    ),
    "vipllava": Family(
        "ViP-LLaVA (image tokens in a text)",
        "VipLlavaConfig",
        "VipLlavaForConditionalGeneration",
        {
            "vision_config": {**PICTURE, "model_type": "clip_vision_model"},
            "text_config": {**DECODER, "model_type": "llama"},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layers": [-1, -2],
        },
        picture_and_text,
        last_token,
        entries=("input_ids", "pixel_values"),
        refusal="tokens of one sequence",
        apart=False,
        why="image tokens within a text",
        tolerance=1e-5,
        before_5=VALUES,
    ),
    "llava": Family(
        "LLaVA",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**PICTURE, "model_type": "clip_vision_model"},
            "text_config": {**DECODER, "model_type": "llama"},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
        picture_and_text,
        last_token,
        uncaptured=r"fixes the batch size of pixel_values.*aten.unbind.int.*modeling_llava.py",
        before_5=VALUES,
        why="a loop over images fixes their number (`unbind`)",
    ),
    "qwen2_vl": Family(
        "Qwen2-VL",
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 48,
                "hidden_size": 48,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
            "image_token_id": IMAGE_TOKEN,
        },
        patches_and_text,
        last_token,
        uncaptured=VALUES,
        why="its windows are cut at values of `image_grid_thw`",
    ),
    "detr": Family(
        "DETR, per query",
        "DetrConfig",
        "DetrForObjectDetection",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_queries": 3,
            "num_labels": 4,
            "use_pretrained_backbone": False,
        },
        detection,
        lambda length: (1, 2),
        entries=("pixel_values",),
        also_refuses=frozenset({"second_layer"}),
        why="queries that are read join later",
        fixed=True,
        pads=False,
        full={"use_pretrained_backbone": False},
        full_inputs=partial(detection, size=512),
    ),
}


def refused(name: str) -> str:
    """Words of the refusal to capture a family under this transformers, or "skipped"."""
    family = FAMILIES[name]
    old = int(transformers.__version__.split(".")[0]) < 5
    return (old and family.before_5) or family.uncaptured


def made(family: Family, sizes: dict[str, Any]) -> nn.Module:
    """A stock model of these sizes with its own initial weights, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, family.config)(**sizes)
        for name, value in family.settings.items():
            setattr(config, name, value)
        return getattr(transformers, family.model)(config).eval()


@cache
def build(name: str) -> nn.Module:
    """A family's small model in float64 with weights that use every branch."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = made(family, {"vocab_size": VOCABULARY, **family.sizes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.double()


def inputs(name: str, batch: int, length: int = 9, seed: int = 0) -> Inputs:
    """A random call of a family's model."""
    given = FAMILIES[name].inputs(batch, length, torch.Generator().manual_seed(seed))
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
