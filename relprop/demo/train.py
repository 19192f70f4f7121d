"""Train and evaluate the demo model: `python -m relprop.demo.train`, then `python -m relprop.demo.train --evaluate`.

A small Vision Transformer starts slowly on small data. Some things speed it up, none of which changes the model:
single digits come first and scenes of two and three follow; the matrices of the blocks get orthogonal updates; and
until the last quarter of the time the patch tokens, read out by the same head, are told which digit's ink they show
(in the first half, with a third of the patches left out, mostly blank ones). The last quarter trains the class token's
multi-label loss alone, on whole images.

All that depends on progress (learning rate, stages) follows the clock, so that any machine ends in the given minutes
with a finished schedule; the outcome therefore depends on the machine's speed, and only the scenes are reproducible.
The moving average of the weights is written every two minutes: a run that is cut off leaves some.

The shipped weights come from four runs, each from the end of the one before (`training_runs` in digits_vit.json): the
first had single digits, AdamW for all weights and no labels of patches; the others had `--mixed`, the second without
leaving patches out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from relprop.demo.digits import IMAGE_SIZE, NUM_CLASSES, SPLIT_SEED, DigitScenes, split_indices
from relprop.demo.model import WEIGHTS, build_model, load_model, preprocess
from relprop.errors import MissingDependencyError

__all__ = ["average_precision", "evaluate", "train"]

EVALUATION_SEED = 1000
EVALUATION_SCENES = 3000
_WATCH_SEED, _WATCH_SCENES = 2000, 300  # for the log alone: nothing is chosen by it
_BATCH = 64
_PATCH, _PATCH_INK = 8, 0.08  # a patch shows a digit if its ink covers more than this share of it
_PATCHES_UNTIL = 0.75  # share of the time in which patches have labels, too
_SPARSE, _SPARSE_UNTIL = 40, 0.5  # patches kept of 64, until this share of the time
_FRESH = 16  # scenes of each batch drawn anew; the others are repeated from the pool
_POOL = 20_000
_PEAK_LR = 1e-3
_PEAK_RATE = 0.004  # of `_Muon`
_WARMUP_STEPS = 100
_MIXED = (2, 3)  # digits per scene in the second stage: more truth per image than pairs alone
_DECAY = 0.996  # of the weights' moving average
_SINGLE_ACCURACY = 0.96  # running accuracy on single digits that ends the first stage ...
_SINGLE_LIMIT = 0.35  # ... or this share of the time, whichever comes first


def average_precision(
    model: nn.Module, scenes: DigitScenes, num_scenes: int, *, batch_size: int = 250
) -> NDArray[np.float64]:
    """Average precision [10] per class of `model` over the first `num_scenes` scenes; its mean is the macro mAP.

    Raises MissingDependencyError where scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise MissingDependencyError(
            "the evaluation needs scikit-learn, which is not installed; install it with: pip install 'relprop[demo]'"
        ) from error
    truth, scores = [], []
    with torch.inference_mode():
        for start in range(0, num_scenes, batch_size):
            batch = scenes.batch(range(start, min(start + batch_size, num_scenes)))
            scores.append(model(preprocess(batch.images)).numpy())
            truth.append(batch.labels.numpy())
    return np.asarray(average_precision_score(np.concatenate(truth), np.concatenate(scores), average=None))


def evaluate(weights: Path, report: Path, *, num_scenes: int = EVALUATION_SCENES, seed: int = EVALUATION_SEED) -> float:
    """Macro mAP of stored weights on scenes of two unseen digits over unseen photographs; writes `report` as JSON."""
    import sklearn
    import timm

    model = load_model(weights)
    per_class = average_precision(model, DigitScenes("test", seed, (2, 2)), num_scenes)
    runs = _history(weights)
    result = {
        "mAP": round(float(per_class.mean()), 4),
        "average_precision": {str(digit): round(float(value), 4) for digit, value in enumerate(per_class)},
        "scenes": num_scenes,
        "digits_per_scene": 2,
        "evaluation_seed": seed,
        "split_seed": SPLIT_SEED,
        "unseen_digits": len(split_indices("test")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_minutes": round(sum(run["minutes"] for run in runs), 1),
        "training_runs": runs,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "scikit-learn": sklearn.__version__},
    }
    report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return float(per_class.mean())


def train(
    out: Path,
    *,
    minutes: float = 40.0,
    seed: int = 0,
    start_from: Path | None = None,
    mixed: bool = False,
    pace: float = 1.0,
) -> Path:
    """Train for `minutes` of wall time; writes `digits_vit.safetensors` and `digits_vit_log.csv` to `out`.

    With `start_from` it goes on from the weights of an earlier run; `mixed` leaves the stage of single digits out;
    `pace` multiplies the learning rates. Returns the path of the weights. Raises ValueError for a length that is not
    positive, and WeightsError where `start_from` does not fit.
    """
    if not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    out.mkdir(parents=True, exist_ok=True)
    weights = out / WEIGHTS.name
    torch.manual_seed(seed)
    model = build_model() if start_from is None else load_model(start_from).train()
    earlier = [] if start_from is None else _history(start_from)
    watch = DigitScenes("test", _WATCH_SEED, (2, 2))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, muon = _optimizer(model), _Muon(model)
    start, saved = time.monotonic(), 0.0
    single, accuracy = not mixed, 0.0
    losses: list[float] = []
    with (out / "digits_vit_log.csv").open("w", newline="", encoding="utf-8") as stream:
        log = csv.writer(stream)
        log.writerow(["stage", "minutes", "step", "loss", "single_accuracy", "mAP"])
        batches = _batches(DigitScenes("train", seed, (1, 1) if single else _MIXED), seed)
        for step in count(1):
            elapsed = (time.monotonic() - start) / 60
            done = elapsed / minutes
            if single and (accuracy > _SINGLE_ACCURACY or done > _SINGLE_LIMIT):
                single, batches = False, _batches(DigitScenes("train", seed, _MIXED), seed)
            if done >= 1 or elapsed - saved >= 2:
                saved = elapsed
                run = {
                    "minutes": round(elapsed, 1),
                    "steps": step - 1,
                    "seed": seed,
                    "batch_size": _BATCH,
                    "pace": pace,
                }
                _save(average, weights, [*earlier, run])
                score = float(average_precision(average, watch, _WATCH_SCENES).mean())
                told = [elapsed, step - 1, float(np.mean(losses or [math.nan])), accuracy, score]
                log.writerow(["single" if single else "mixed", *(f"{value:.4g}" for value in told)])
                stream.flush()
                losses = []
                if done >= 1:
                    return weights
            images, labels, patches = next(batches)
            rate = pace * min(1.0, step / _WARMUP_STEPS) * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_LR * rate
            if done < _SPARSE_UNTIL:
                features, patches = _sparse_features(model, images, patches)
            else:
                features = model.forward_features(images)
            logits = model.forward_head(features)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            losses.append(float(loss.detach()))
            if done < _PATCHES_UNTIL:
                loss = loss + F.binary_cross_entropy_with_logits(model.head(features[:, 1:]), patches)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            muon.step(_PEAK_RATE * rate)
            with torch.no_grad():
                decay = min(_DECAY, step / (step + 10))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
                if single:
                    hits = (logits.argmax(1) == labels.argmax(1)).float().mean()
                    accuracy += 0.02 * (float(hits) - accuracy)
    raise AssertionError("unreachable")


def _sparse_features(
    model: VisionTransformer, images: torch.Tensor, patches: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, 1 + 40, 128] of the class token and the kept patches, and their labels [B, 40, 10].

    Patches with ink are kept first, then random ones: a step costs two thirds, and little is lost.
    """
    order = patches.amax(2) + torch.rand(patches.shape[:2])
    kept = order.topk(_SPARSE, dim=1).indices[..., None]
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    tokens = tokens.gather(1, kept.expand(-1, -1, tokens.shape[2]))
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    features = model.norm(model.blocks(torch.cat([first, tokens], 1)))
    return features, patches.gather(1, kept.expand(-1, -1, patches.shape[2]))


class _Muon:
    """Momentum whose update is made orthogonal, for the blocks' matrices; it needs fewer steps than Adam.

    Matrices of one shape are stacked, and the three of a fused qkv count as three. Rates are spectral norms per step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[list[torch.Tensor]] = [[], []]
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2:
                self.groups[".mlp." in name].append(p)
        self.momentum = [[torch.zeros_like(p) for p in group] for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momentum, strict=True):
            torch._foreach_lerp_(momentum, [p.grad for p in group], 0.05)
            ahead = torch._foreach_lerp([p.grad for p in group], momentum, 0.95)
            width = min(group[0].shape)
            tall = [g if g.shape[1] == width else g.T for g in ahead]
            rows = min(g.shape[0] for g in tall)
            parts = torch.cat([g.reshape(-1, rows, width) for g in tall])
            updates = _orthogonal(parts) * (rows / width) ** 0.5
            sizes = [g.shape[0] // rows for g in tall]
            for p, update in zip(group, updates.split(sizes), strict=True):
                flat = update.reshape(-1, width)
                p.mul_(1 - rate * 0.05).sub_(flat if p.shape[1] == width else flat.T, alpha=rate)


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Each matrix of [N, rows, cols <= rows] with its singular values brought near 1 (quintic Newton-Schulz)."""
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x.mT @ x
        x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return x


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW for all that `_Muon` leaves: embeddings, norms, biases and the head."""
    rest = [p for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
    decayed, plain = [p for p in rest if p.ndim in (2, 4)], [p for p in rest if p.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_PEAK_LR, betas=(0.9, 0.99), fused=True)


def _batches(scenes: DigitScenes, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (inputs [64, 3, 64, 64], labels [64, 10], labels of patches [64, 64, 10]).

    Some scenes are drawn anew, the others come out of those drawn before: drawing costs a third of a training step per
    scene. Colours change each time a scene is used.
    """
    rng = np.random.default_rng((seed, 7))
    images = torch.empty(_POOL, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    labels = torch.empty(_POOL, NUM_CLASSES)
    patches = torch.empty(_POOL, (IMAGE_SIZE // _PATCH) ** 2, NUM_CLASSES, dtype=torch.bool)
    drawn = 0
    while True:
        fresh = _FRESH if drawn >= 10 * _BATCH else _BATCH
        batch = scenes.batch(range(drawn, drawn + fresh))
        slots = torch.arange(drawn, drawn + fresh) % _POOL
        images[slots], labels[slots] = batch.images, batch.labels
        patches[slots] = (F.avg_pool2d(batch.masks.float(), _PATCH) > _PATCH_INK).flatten(2).mT
        drawn += fresh
        again = torch.from_numpy(rng.integers(min(drawn, _POOL), size=_BATCH - fresh))
        chosen = torch.cat([slots, again])
        gain = torch.from_numpy(rng.uniform(0.8, 1.2, size=(_BATCH, 1, 1, 1))).float()
        pixels = (images[chosen].float() * gain).clamp(0, 255)[:, torch.from_numpy(rng.permutation(3))]
        yield preprocess(pixels.to(torch.uint8)), labels[chosen], patches[chosen].float()


def _history(weights: Path) -> list[dict[str, float]]:
    """What `train` noted inside its weights, one entry per run: minutes, steps, seed, batch size."""
    with safe_open(weights, framework="pt") as stored:
        return json.loads((stored.metadata() or {}).get("runs", "[]"))


def _save(model: nn.Module, path: Path, runs: list[dict[str, float]]) -> None:
    part = path.with_suffix(".part")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, part, metadata={"runs": json.dumps(runs)})
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None, *, say: Callable[[str], None] = print) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m relprop.demo.train", description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall time of the training")
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder of weights, log and report")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training scenes")
    parser.add_argument("--start-from", type=Path, help="weights of an earlier run to go on from")
    parser.add_argument("--mixed", action="store_true", help="leave the stage of single digits out")
    parser.add_argument("--pace", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the weights in --out instead of training")
    options = parser.parse_args(arguments)
    if options.evaluate:
        report = options.out / WEIGHTS.with_suffix(".json").name
        say(f"mAP {evaluate(options.out / WEIGHTS.name, report):.4f}, written to {report}")
    else:
        path = train(
            options.out,
            minutes=options.minutes,
            seed=options.seed,
            start_from=options.start_from,
            mixed=options.mixed,
            pace=options.pace,
        )
        say(f"weights written to {path}")


if __name__ == "__main__":
    main()
