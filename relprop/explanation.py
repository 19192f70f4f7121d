"""What a call returns: relevance and everything needed to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.annotation import Annotation, Normalisation
from relprop.errors import ShapeError, unknown_name
from relprop.latents import Latent
from relprop.ledger import Ledger

if TYPE_CHECKING:
    from PIL import Image

    from relprop.pictures.view import View


@dataclass(frozen=True)
class TokenKinds:
    """What each token is. Which class tokens there are depends on what the output read, which the device knows.

    Attributes:
        plain: per token "patch" or "word" where it comes from an explained input, "" for one of the model's own.
        profile: how much the output reads of each token. [T or 1, B, N]
    """

    plain: Sequence[str]
    profile: Tensor

    def names(self) -> tuple[str, ...]:
        """Per token "patch" or "word", "class" or "register"; waits for the device."""
        read = (self.profile.amax((0, 1)) > 0).tolist()
        others = ("class" if is_read else "register" for is_read in read)
        return tuple(plain or other for plain, other in zip(self.plain, others, strict=True))


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of one sequence are, and how they lie.

    Attributes:
        kinds: what tells each one's.
        grid: (h, w) of an image's patches, None otherwise.
    """

    kinds: TokenKinds
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Explanation:
    """One batch of explanations.

    Attributes:
        relevance: over tokens, class token and registers included: [B, N], or [B, T, N] for T targets; for methods
            that reach the input one value per pixel [B, H, W] or per input token [B, N], of the first explained input.
        relevances: the same by input name; methods that reach the input answer for every explained one, and so does
            `generic_attention` between sequences, over the tokens that an input becomes.
        logits: the model's output. [B, ...]
        target: indices explained, None for a callable. [B], [B, T], ...
        method, composite: names.
        kinds: what tells `token_kinds`, None for pixels.
        grid: (h, w) of the patches in `relevance`, None where it is of no image.
        layouts: where inputs become sequences of their own, each one's tokens by input name.
        origins: where tokens of several inputs stand in one row, the input of each token, "" for the model's own.
        image_size: (H, W) of the input image, None otherwise.
        ledger: the books of the pass, if asked for.
        matrices: of `generic_attention` with the option `rows="all"`, by the names of two inputs: how much each token
            of the first one's sequence stands for each token of the second one's. With text t and image i they are
            R_tt, R_ti, R_it and R_ii of the paper; "learned" is a sequence of learned queries, and sequences that no
            attention leads to have no pair. Each [B, N, M] or [B, T, N, M]
        latents: relevance inside the model, by module path, where compilation was asked for it; see `at`.
        disagreement: relative difference to runs with a slightly moved input, the larger, if asked for. [B] or [B, T]
        trustworthy: disagreement below the method's threshold, if asked for. [B] or [B, T], bool
        inputs: the model's tensors, by name and by reference: what `show` and `save` draw on. They stay in memory as
            long as the explanation; `dataclasses.replace(explanation, inputs={})` lets go of them.
        annotation: images, token strings and class names for `show` and `save`; see `annotated`.
    """

    relevance: Tensor
    relevances: dict[str, Tensor]
    logits: Tensor
    target: Tensor | None
    method: str
    composite: str
    kinds: TokenKinds | None = field(default=None, repr=False)
    grid: tuple[int, int] | None = None
    layouts: Mapping[str, TokenLayout] = field(default_factory=dict, repr=False)
    origins: tuple[str, ...] = field(default=(), repr=False)
    image_size: tuple[int, int] | None = None
    ledger: Ledger | None = None
    latents: Mapping[str, Latent] = field(default_factory=dict)
    matrices: Mapping[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)
    disagreement: Tensor | None = None
    trustworthy: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    annotation: Annotation = field(default_factory=Annotation, repr=False)

    @cached_property
    def token_kinds(self) -> tuple[str, ...]:
        """Per token of `relevance` "class", "register", "patch" or "word"; empty for pixels.

        Found when first asked for: the call itself does not wait for a GPU.
        """
        return () if self.kinds is None else self.kinds.names()

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.relevance)

    @property
    def several(self) -> bool:
        """Whether there is an axis of targets."""
        if self.target is not None:
            return self.target.ndim == (2 if self.logits.ndim == 2 else 3)
        pixels = self.kinds is None and not self.layouts and tuple(self.relevance.shape[-2:]) == self.image_size
        single = 3 if pixels or self.matrices else 2  # with matrices a row for each token
        return self.relevance.ndim > single

    def at(self, path: str) -> Latent:
        """Relevance at a module's output ("blocks.5.mlp"), its input ("blocks.5.mlp:input") or its attention heads
        ("blocks.5.attn:heads").

        Rows that carry no relevance are left out: above a classifier's last attention layer there is one.

        Raises:
            UnknownNameError: `latents` of `compile` or `explain` did not ask for it.

        Example:
            >>> import relprop
            >>> from relprop.demo import bundled_scenes, load_model, preprocess
            >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
            >>> latents = ["blocks.2.mlp", "blocks.*.attn:heads"]
            >>> found = relprop.explain(model, images, method="attnlrp", latents=latents)
            >>> found.at("blocks.2.mlp").relevance.shape  # of every neuron of every token
            torch.Size([1, 65, 128])
            >>> found.at("blocks.2.attn:heads").per_token().shape
            torch.Size([1, 4, 65])
        """
        if path not in self.latents:
            raise unknown_name("latent (name it in `latents` when compiling)", path, self.latents)
        return self.latents[path]

    @property
    def pictured(self) -> str | None:
        """The input whose relevance `image_map` has, None where there is no map."""
        if self.image_size is None:
            return None
        if self.kinds is None and not self.layouts:
            maps = {**self.relevances, "": self.relevance}
            return next((n for n, m in maps.items() if m.ndim > 2 and tuple(m.shape[-2:]) == self.image_size), None)
        found = self._patch_tokens()
        return None if found is None or found[1].ndim != 2 + self.several else found[0]

    @property
    def has_image_map(self) -> bool:
        """Whether `image_map` has something to show."""
        return self.pictured is not None

    def _patch_tokens(self) -> tuple[str, Tensor, TokenLayout] | None:
        """An image's name, relevance of the sequence that its patches stand in, and how they lie there."""
        lying = ((name, self.relevances.get(name), one) for name, one in self.layouts.items() if one.grid is not None)
        found = next(((name, relevance, one) for name, relevance, one in lying if relevance is not None), None)
        if found is not None or self.kinds is None or self.grid is None:
            return found
        origins = self.origins or (next(iter(self.relevances), ""),) * len(self.kinds.plain)
        name = next((o for o, plain in zip(origins, self.kinds.plain, strict=True) if plain == "patch"), "")
        return name, self.relevance, TokenLayout(self.kinds, self.grid)

    @property
    def patches(self) -> Tensor:
        """Relevance of an image's patches, class and register tokens dropped. [B, h, w] or [B, T, h, w]

        Raises:
            ShapeError: the tokens are not an image's patches, or there is a row of them for each token.
        """
        found = self._patch_tokens()
        if found is None:
            raise ShapeError(
                f"patches: expected relevance over the patches of an image, got {list(self.relevance.shape)} over"
                f" {self.token_kinds[0] + 's' if self.token_kinds else 'the input'}"
            )
        name, relevance, layout = found
        if relevance.ndim != 2 + self.several:
            raise ShapeError(
                f"patches: expected one number for each token{f' of {name}' if name else ''}, got"
                f" {list(relevance.shape)}, as of every row (option rows='all')"
            )
        assert layout.grid is not None
        kept = torch.tensor([kind == "patch" for kind in layout.kinds.names()], device=relevance.device)
        return relevance[..., kept].reshape(*relevance.shape[:-1], *layout.grid)

    def image_map(self) -> Tensor:
        """Relevance at the size of the input image, patches enlarged bilinearly. [B, H, W] or [B, T, H, W]

        Raises:
            ShapeError: the input is not an image, or there is no relevance over its pixels or patches.
        """
        if self.image_size is None:
            raise ShapeError(f"image_map: expected an image as input, got relevance {list(self.relevance.shape)}")
        if self.kinds is None and not self.layouts:
            maps = [self.relevance, *self.relevances.values()]
            pixels = next((m for m in maps if m.ndim > 2 and tuple(m.shape[-2:]) == self.image_size), None)
            if pixels is None:
                got = {name: list(one.shape) for name, one in self.relevances.items()} or list(self.relevance.shape)
                raise ShapeError(f"image_map: expected relevance over an image of {self.image_size} pixels, got {got}")
            return pixels
        patches = self.patches
        flat = patches.reshape(-1, 1, *patches.shape[-2:])
        large = F.interpolate(flat.float(), size=self.image_size, mode="bilinear", align_corners=False)
        return large.reshape(*patches.shape[:-2], *self.image_size)

    def image_input(self) -> Tensor | None:
        """The images as the model was given them, None where the input is no image. [B, C, H, W]"""
        found = (t for t in self.inputs.values() if t.ndim == 4 and tuple(t.shape[-2:]) == self.image_size)
        return next(found, None)

    def target_maps(self) -> Tensor:
        """`image_map` with an axis of targets, channels that a method kept summed. [B, T, H, W]"""
        maps = self.image_map()
        maps = maps if self.several else maps.unsqueeze(1)
        return maps.sum(2) if maps.ndim == 5 else maps

    def target_names(self, sample: int) -> list[str]:
        """What each target of a sample is called: its label, or the number of its class."""
        if self.target is None:
            count = self.relevance.shape[1] if self.several else 1
            return [f"target {i}" for i in range(count)] if count > 1 else ["target"]
        rows = self.target[sample].cpu()
        rows = rows if self.several else rows.unsqueeze(0)
        return [self.annotation.label(row.reshape(-1).tolist()) for row in rows]

    def annotated(
        self,
        *,
        images: Any = None,
        tokens: Any = None,
        labels: Sequence[str] | Mapping[int, str] | None = None,
        normalisation: Normalisation | None = None,
    ) -> Explanation:
        """The same with names and pictures for `show`, `save` and notebooks; relevance is not copied.

        Args:
            images: as the model sees them: PIL images, files, or a tensor [B, 3, H, W] of uint8 or of floats from 0 to
                1. By default the model's own input, stretched from its darkest to its lightest value.
            tokens: a tokenizer of transformers, or a list of strings for each sample; of several inputs a mapping to
                these by input name. Inputs without token ids are numbered where nothing names their tokens.
            labels: class names by index: a sequence, or a mapping such as `model.config.id2label`.
            normalisation: (mean, std) of the model's input, so that it can be shown without `images`.
        """
        notes = self.annotation.with_(images=images, tokens=tokens, labels=labels, normalisation=normalisation)
        return replace(self, annotation=notes)

    def view(self, **options: Any) -> View:
        """What `show` and `save` show, with their options: a picture of images, coloured text of tokens.

        Args:
            over: of an image: "targets", or the "layers" or "heads" that `latents` named.
            scale: what colours are comparable within: "map" (each on its own), "sample" or "batch".
            signed: paint values below 0 as their own side; by default where the method has such.
            samples: which of the batch, all by default.
            columns, side: of pictures: maps in a row, pixels of a map.
            heading: above all.
            images, tokens, labels, normalisation: as `annotated` takes them.
        Raises:
            OptionError, ShapeError, NonFiniteError: what is to be shown. MissingDependencyError: pictures need
                matplotlib; texts do not.
        """
        from relprop.pictures.explanations import explanation_view

        return explanation_view(self, **options)

    def picture(self, **options: Any) -> Image.Image:
        """The heat maps of `view` as a picture."""
        return self.view(**options).image()

    def html(self, *, theme: str = "auto", **options: Any) -> str:
        """`view` as a fragment of HTML that stands alone. theme: "auto", "light" or "dark"."""
        return self.view(**options).html(theme)

    def show(self, **options: Any) -> None:
        """Show `view`: as the output of a notebook, in the terminal (texts), or in the system's viewer (pictures)."""
        self.view(**options).show()

    def save(self, path: str | Path, *, theme: str = "auto", **options: Any) -> Path:
        """Write `view` as a picture (.png, .jpg, .webp) or a page (.html).

        Raises:
            OptionError: another suffix. OutputError: it cannot be written. Others as `view`.
        """
        return self.view(**options).save(path, theme)

    def _repr_html_(self) -> str | None:
        return self.view()._repr_html_()
