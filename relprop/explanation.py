"""What a call returns: relevance and everything needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.errors import ShapeError
from relprop.ledger import Ledger


@dataclass(frozen=True)
class Explanation:
    """One batch of explanations.

    Attributes:
        relevance: over tokens, class token and registers included: [B, N], or [B, T, N] for T targets; for methods
            that reach the input one value per pixel [B, H, W] or per input token [B, N].
        relevances: the same by input name, where a method answers for several inputs.
        logits: the model's output. [B, ...]
        target: indices explained, None for a callable. [B], [B, T], ...
        method, composite: names.
        token_kinds: per token of `relevance` "class", "register" or "patch" / "word"; empty for pixels.
        grid: (h, w) of the patches of an image model, None otherwise.
        image_size: (H, W) of the input image, None otherwise.
        ledger: the books of the pass, if asked for.
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
    disagreement: Tensor | None = None
    trustworthy: Tensor | None = None

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
            return self.relevance
        patches = self.patches
        flat = patches.reshape(-1, 1, *patches.shape[-2:])
        large = F.interpolate(flat.float(), size=self.image_size, mode="bilinear", align_corners=False)
        return large.reshape(*patches.shape[:-2], *self.image_size)
