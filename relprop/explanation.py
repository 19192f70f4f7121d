"""What a call returns: relevance and everything needed to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.errors import ShapeError, unknown_name
from relprop.latents import Latent
from relprop.ledger import Ledger


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
        token_kinds: per token of `relevance` "class", "register" or "patch" / "word"; empty for pixels.
        grid: (h, w) of the patches of an image model, None otherwise.
        image_size: (H, W) of the input image, None otherwise.
        ledger: the books of the pass, if asked for.
        latents: relevance inside the model, by module path, where compilation was asked for it; see `at`.
        disagreement: relative difference to runs with a slightly moved input, the larger, if asked for. [B] or [B, T]
        trustworthy: disagreement below the method's threshold, if asked for. [B] or [B, T], bool
    """

    relevance: Tensor
    relevances: dict[str, Tensor]
    logits: Tensor
    target: Tensor | None
    method: str
    composite: str
    token_kinds: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    ledger: Ledger | None = None
    latents: Mapping[str, Latent] = field(default_factory=dict)
    disagreement: Tensor | None = None
    trustworthy: Tensor | None = None

    def at(self, path: str) -> Latent:
        """Relevance at a module's output ("blocks.5.mlp"), or at its attention heads ("blocks.5.attn:heads").

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
    def patches(self) -> Tensor:
        """Relevance of an image's patches, class and register tokens dropped. [B, h, w] or [B, T, h, w]

        Raises:
            ShapeError: the tokens are not an image's patches.
        """
        if self.grid is None:
            raise ShapeError(
                f"patches: expected relevance over the patches of an image, got {list(self.relevance.shape)} over"
                f" {self.token_kinds[0] + 's' if self.token_kinds else 'the input'}"
            )
        kept = torch.tensor([kind == "patch" for kind in self.token_kinds], device=self.relevance.device)
        return self.relevance[..., kept].reshape(*self.relevance.shape[:-1], *self.grid)

    def image_map(self) -> Tensor:
        """Relevance at the size of the input image, patches enlarged bilinearly. [B, H, W] or [B, T, H, W]

        Raises:
            ShapeError: the input is not an image.
        """
        if self.image_size is None:
            raise ShapeError(f"image_map: expected an image as input, got relevance {list(self.relevance.shape)}")
        if not self.token_kinds:
            maps = [self.relevance, *self.relevances.values()]
            return next(found for found in maps if found.ndim > 2 and tuple(found.shape[-2:]) == self.image_size)
        patches = self.patches
        flat = patches.reshape(-1, 1, *patches.shape[-2:])
        large = F.interpolate(flat.float(), size=self.image_size, mode="bilinear", align_corners=False)
        return large.reshape(*patches.shape[:-2], *self.image_size)
