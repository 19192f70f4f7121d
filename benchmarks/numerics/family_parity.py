"""float32 errors of relprop beside those of the field's other code, on the same inputs, family by family.

As `float32_parity` for Vision Transformers and BERT: truth is their code in float64, and an answer in float32 is judged
by their own float32. DETR, LXMERT and CLIP by their authors' code (Chefer et al., ICCV 2021), BERT, GPT-2, Llama and
torchvision's ViT by LXT, and a small network by zennit. Run:
`python -m benchmarks.numerics.family_parity --multimodal CHECKOUT`, with lxt and zennit installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import relprop
from benchmarks.numerics.float32_parity import BAR, Errors, row
from benchmarks.numerics.intervals import clustered_geometric_mean, geometric_mean
from benchmarks.numerics.lxt import Lxt, LxtText, exact_slopes
from benchmarks.numerics.models import CLASSES, SHAPES, WORDS, Case, doubled, drawn, random_text_case, relative_error
from benchmarks.numerics.reference_multimodal import COMMIT, ReferenceClip, ReferenceDetr, ReferenceLxmert
from benchmarks.numerics.rows import RESULTS, markdown, read_rows, write_rows
from relprop.compat.chefer import DetrGenerator, GeneratorOurs, interpret

FIRST_SEED = 500
QUESTION = 3  # DETR's query that is explained

Answer = Callable[[nn.Module], Tensor]  # from a model, in float32 or float64, to relevance [n, M]


@dataclass(frozen=True)
class Comparison:
    """One model with what relprop and another code answer for it."""

    family: str
    method: str
    model: nn.Module
    ours: Answer
    theirs: Answer
    reference: str


def like(model: nn.Module, given: Tensor) -> Tensor:
    """Floating-point inputs in the model's dtype."""
    return given.to(next(model.parameters()).dtype) if given.is_floating_point() else given


def detr(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """Generic attention and the same with relevance, for one query of a small DETR."""
    import transformers

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
        d_model=shape.dim,
        encoder_layers=shape.depth,
        decoder_layers=shape.depth,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=2 * shape.dim,
        decoder_ffn_dim=2 * shape.dim,
        num_queries=7,
        num_labels=CLASSES,
        dropout=0.0,
    )
    model = drawn(transformers.DetrForObjectDetection(config).eval(), shape.gain, seed)
    images = torch.randn(inputs, 3, 96, 128, generator=generator)
    classes = torch.randint(CLASSES, (inputs,), generator=generator)
    for method, with_relevance in (("generate_ours", False), ("generate_ours, relevance", True)):

        def ours(at: nn.Module, use_lrp: bool = with_relevance) -> Tensor:
            found = DetrGenerator(at).generate_ours(like(at, images), QUESTION, classes, use_lrp=use_lrp)
            return found[0].double()

        def theirs(at: nn.Module, use_lrp: bool = with_relevance) -> Tensor:
            return ReferenceDetr(checkout, at).explain(like(at, images), QUESTION, classes, use_lrp)

        yield Comparison("detr", method, model, ours, theirs, COMMIT)


def lxmert(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """Generic attention and the same with relevance, R_t_i of a small LXMERT."""
    import transformers

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    config = transformers.LxmertConfig(
        vocab_size=WORDS,
        hidden_size=shape.dim,
        num_attention_heads=shape.heads,
        intermediate_size=2 * shape.dim,
        l_layers=shape.depth,
        x_layers=2,
        r_layers=2,
        num_qa_labels=CLASSES,
        visual_feat_dim=16,
        max_position_embeddings=32,
    )
    model = drawn(transformers.LxmertForQuestionAnswering(config).eval(), shape.gain, seed)
    given = {
        "input_ids": torch.randint(1, WORDS, (inputs, 12), generator=generator),
        "attention_mask": torch.ones(inputs, 12, dtype=torch.int64),
        "visual_feats": torch.randn(inputs, 10, 16, generator=generator),
        "visual_pos": torch.rand(inputs, 10, 4, generator=generator),
    }
    answers = torch.randint(CLASSES, (inputs,), generator=generator)
    for method, with_relevance in (("generate_ours", False), ("generate_ours, relevance", True)):

        def ours(at: nn.Module, use_lrp: bool = with_relevance) -> Tensor:
            own = {name: like(at, value) for name, value in given.items()}
            return GeneratorOurs(at).generate_ours(own, answers, use_lrp=use_lrp)[1].flatten(1).double()

        def theirs(at: nn.Module, use_lrp: bool = with_relevance) -> Tensor:
            own = {name: like(at, value) for name, value in given.items()}
            return ReferenceLxmert(checkout, at).explain(own, answers, use_lrp)

        yield Comparison("lxmert", method, model, ours, theirs, COMMIT)


def clip(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """Relevance of the patches for a pair's similarity, from all layers on."""
    import transformers

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": WORDS,
            "hidden_size": shape.dim,
            "intermediate_size": 4 * shape.dim,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": 12,
            "eos_token_id": 2,  # the largest id is the end, as in theirs
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=32,
    )
    model = drawn(transformers.CLIPModel(config).eval(), shape.gain, seed)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    images = torch.randn(inputs, 3, 32, 32, generator=generator)
    texts = torch.randint(3, WORDS - 1, (inputs, 12), generator=generator)
    texts[:, -1] = WORDS - 1

    def ours(at: nn.Module) -> Tensor:
        return interpret(like(at, images), texts, at, "cpu", 0, 0)[1].double()

    def theirs(at: nn.Module) -> Tensor:
        return ReferenceClip(checkout, at).explain(like(at, images), texts)

    yield Comparison("clip", "interpret", model, ours, theirs, COMMIT)


_lxt_text, _lxt_vit = functools.cache(LxtText), functools.cache(Lxt)  # each changes classes when it is made


def with_and_without_epsilon(comparison: Comparison) -> Iterator[Comparison]:
    """LXT as it is, and with exact slopes: what is left of a difference in float64 is not its epsilon's."""

    def exact(at: nn.Module) -> Tensor:
        with exact_slopes():
            return comparison.theirs(at)

    yield comparison
    yield replace(comparison, method=f"{comparison.method}, exact slopes", theirs=exact)


def lxt_bert(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """AttnLRP of a small BERT."""
    case = random_text_case(seed, inputs)

    def ours(at: nn.Module) -> Tensor:
        return relprop.explain(at, method="attnlrp", target=case.targets, **case.words).relevance.double()

    def theirs(at: nn.Module) -> Tensor:
        model = _lxt_text("bert").patched(at)
        with torch.enable_grad():
            embedded = model.bert.embeddings.word_embeddings(case.ids).detach().requires_grad_()
            scores = model(inputs_embeds=embedded, attention_mask=case.words["attention_mask"]).logits
            scores.gather(1, case.targets[:, None]).sum().backward()
        return (embedded * embedded.grad).sum(-1).detach().double()

    yield from with_and_without_epsilon(Comparison("bert (LXT)", "attnlrp", case.model, ours, theirs, "lxt 2.1"))


def lxt_vit(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """CP-LRP of a small ViT of torchvision."""
    from torchvision.models import VisionTransformer

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    model = VisionTransformer(32, 8, shape.depth, shape.heads, shape.dim, 4 * shape.dim, num_classes=CLASSES)
    drawn(model.eval(), shape.gain, seed)
    images = torch.randn(inputs, 3, 32, 32, generator=generator)
    target = seed % CLASSES

    def ours(at: nn.Module) -> Tensor:
        return relprop.explain(at, like(at, images), method="cp_lrp", target=target).relevance.flatten(1).double()

    def theirs(at: nn.Module) -> Tensor:
        with torch.enable_grad():
            return _lxt_vit().explain(at, like(at, images), target).flatten(1).double()

    yield from with_and_without_epsilon(Comparison("vit (LXT)", "cp_lrp", model, ours, theirs, "lxt 2.1"))


def zennit(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """Rules of zennit's EpsilonPlus on a small convolutional network."""
    generator = torch.Generator().manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten())
    model = drawn(nn.Sequential(*layers, nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval(), 1.5, seed)
    images = torch.randn(inputs, 3, 16, 16, generator=generator)
    target = seed % CLASSES

    def ours(at: nn.Module) -> Tensor:
        options = {"method": "full", "composite": "epsilon_plus", "method_options": {"channels": "kept"}}
        return relprop.explain(at, like(at, images), target=target, **options).relevance.flatten(1).double()

    def theirs(at: nn.Module) -> Tensor:
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlus

        with torch.enable_grad(), Gradient(copy.deepcopy(at), EpsilonPlus()) as attributor:
            start = torch.eye(CLASSES, dtype=next(at.parameters()).dtype)[[target] * inputs]
            seeded = start * at(like(at, images)).detach()
            return attributor(like(at, images), seeded)[1].detach().flatten(1).double()

    yield Comparison("cnn (zennit)", "epsilon_plus", model, ours, theirs, "zennit 0.5.1")


def lxt_decoder(family: str, ids: Tensor, token: int, at: nn.Module) -> Tensor:
    """Relevance of each word, [n, M], for one token's logit at the last position, as LXT has it."""
    model = _lxt_text(family).patched(at)
    with double_throughout(at), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits[:, -1, token].sum().backward()
    assert embedded.grad is not None
    return (embedded * embedded.grad).sum(-1).detach().double()


def lxt_llama(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """AttnLRP of a small Llama, of the last position's logit of one token."""
    import transformers

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=shape.dim,
        intermediate_size=2 * shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        attn_implementation="eager",
    )
    model = drawn(transformers.LlamaForCausalLM(config).eval(), shape.gain, seed)
    ids = torch.randint(1, WORDS, (inputs, 14), generator=generator)
    token = seed % WORDS

    def ours(at: nn.Module) -> Tensor:
        with double_throughout(at):
            found = relprop.explain(at, ids, method="attnlrp", target=(13, token), use_cache=False)
        return found.relevance.double()

    theirs = functools.partial(lxt_decoder, "llama", ids, token)
    yield from with_and_without_epsilon(Comparison("llama (LXT)", "attnlrp", model, ours, theirs, "lxt 2.1"))


@contextlib.contextmanager
def double_throughout(model: nn.Module) -> Iterator[None]:
    """Norms and softmax that transformers and LXT cast to float32 whatever the model's dtype stay in float64."""
    cast, softmax = Tensor.to, nn.functional.softmax

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrows = self.dtype == torch.float64 and args[:1] == (torch.float32,)
        return self if narrows else cast(self, *args, **kwargs)

    def wide_softmax(scores: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return softmax(scores, *args, dtype=None if dtype == torch.float32 else dtype, **kwargs)

    if next(model.parameters()).dtype == torch.float64:
        Tensor.to, nn.functional.softmax = to, wide_softmax  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.to, nn.functional.softmax = cast, softmax  # type: ignore[method-assign]


def lxt_gpt2(seed: int, inputs: int, checkout: Path) -> Iterator[Comparison]:
    """AttnLRP of a small GPT-2, of the last position's logit of one token."""
    import transformers

    shape, generator = SHAPES[seed % len(SHAPES)], torch.Generator().manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=shape.dim,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = drawn(transformers.GPT2LMHeadModel(config).eval(), shape.gain, seed)
    ids = torch.randint(1, WORDS, (inputs, 14), generator=generator)
    token = seed % WORDS

    def ours(at: nn.Module) -> Tensor:
        found = relprop.explain(at, ids, method="attnlrp", target=(13, token), use_cache=False)
        return found.relevance.double()

    theirs = functools.partial(lxt_decoder, "gpt2", ids, token)
    yield from with_and_without_epsilon(Comparison("gpt2 (LXT)", "attnlrp", model, ours, theirs, "lxt 2.1"))


FAMILIES = {
    "detr": detr,
    "lxmert": lxmert,
    "clip": clip,
    "zennit": zennit,
    "lxt_vit": lxt_vit,
    "lxt_gpt2": lxt_gpt2,
    "lxt_bert": lxt_bert,
    "lxt_llama": lxt_llama,
}


def measure(made: Sequence[tuple[int, Comparison]]) -> list[Errors]:
    """Errors on each model, all of relprop's answers first: LXT's patches change what comes after them."""
    ours = [(c.ours(c.model), c.ours(doubled(c.model))) for _, c in made]
    found = []
    for (seed, comparison), (single, double) in zip(made, ours, strict=True):
        truth = comparison.theirs(doubled(comparison.model))
        theirs = relative_error(comparison.theirs(comparison.model), truth)
        case = Case(comparison.family, seed, comparison.model, truth, truth[:, 0])
        parts = (relative_error(single, truth), theirs, relative_error(double, truth))
        there = truth.norm(dim=1) > 0  # where their map is empty there is nothing to compare
        found.append(Errors(case, comparison.method, "auto", *(part[there].numpy() for part in parts)))
    return found


def summarise(found: Sequence[Errors]) -> list[dict[str, Any]]:
    """Ours / theirs over all models of a family and method."""
    groups: dict[tuple[str, str], list[Errors]] = defaultdict(list)
    for errors in found:
        groups[errors.case.name, errors.method].append(errors)
    rows = []
    for (family, method), members in groups.items():
        pooled = geometric_mean(np.concatenate([m.ratios for m in members]))
        clustered = clustered_geometric_mean([m.ratios for m in members])
        ours, theirs = (np.concatenate([getattr(m, side) for m in members]) for side in ("ours", "theirs"))
        rows.append(
            {
                "family": family,
                "method": method,
                "inputs": len(ours),
                "median ours": float(np.median(ours)),
                "median theirs": float(np.median(theirs)),
                "ours / theirs": pooled.estimate,
                "upper (t)": pooled.high,
                "upper (models)": clustered.high,
                "our float64, worst": float(max(m.ours_float64.max() for m in members)),
                "holds": max(pooled.high, clustered.high) <= BAR,
            }
        )
    return rows


def others(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of a file that are not measured anew."""
    known = {(row["model"], row["method"]) for row in rows}
    return [row for row in read_rows(path) if (row["model"], row["method"]) not in known] if path.is_file() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics.family_parity", description=__doc__)
    parser.add_argument("--multimodal", type=Path, required=True, help="checkout of Transformer-MM-Explainability")
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES), help="rows of others stay")
    parser.add_argument("--methods", nargs="*", help="of these families, by name; all by default")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=64, help="per model")
    parser.add_argument("--out", type=Path, default=RESULTS / "family_parity.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = [
        (seed, one)
        for name, compare in FAMILIES.items()
        if name in options.families
        for seed in range(FIRST_SEED, FIRST_SEED + options.models)
        for one in compare(seed, options.inputs, options.multimodal)
        if options.methods is None or one.method in options.methods
    ]
    found, rows = measure(made), []
    for errors, (_, comparison) in zip(found, made, strict=True):
        values = {key: value for key, value in row(errors, 0.0).items() if key != "attention_spread"}
        rows.append({**values, "reference": comparison.reference})
    write_rows(options.out, rows, others(options.out, rows))
    print(markdown(summarise(found)))


if __name__ == "__main__":
    main()
