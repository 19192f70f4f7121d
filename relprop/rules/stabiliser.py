"""The one stabiliser: how every rule divides relevance by a share-out denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stabiliser:
    """Division s = R / stab(z).

    `signed`: stab(z) = z + epsilon * sign(z), with sign(0) = 1; epsilon = 0 divides exactly and gives 0 where z = 0.
    `reference`: z + epsilon, unsigned, and a share of exactly 0 where z = 0, as the authors' code of Chefer et al.
    (CVPR 2021) has it in `safe_divide`.

    Args:
        epsilon: in units of z.
        kind: "signed" or "reference".
    """

    epsilon: float = 1e-9
    kind: str = "signed"

    @property
    def code(self) -> tuple[int, float]:
        """(kind, epsilon) as the compiled kernels take it."""
        return (1 if self.kind == "reference" else 0, self.epsilon)

    @property
    def is_exact(self) -> bool:
        return self.epsilon == 0.0

    def share(self, relevance: Tensor, z: Tensor) -> Tensor:
        """relevance / stab(z), elementwise with broadcasting."""
        if self.kind == "reference":
            denominator = z + self.epsilon
            denominator = torch.where(denominator == 0, self.epsilon, denominator)
            return torch.where(z == 0, 0.0, relevance / denominator)
        if self.is_exact:
            return torch.where(z == 0, 0.0, relevance / torch.where(z == 0, 1.0, z))
        # Not z + where(z < 0, -epsilon, epsilon): a choice between two Python numbers is float32.
        return relevance / torch.where(z < 0, z - self.epsilon, z + self.epsilon)


REFERENCE = Stabiliser(1e-9, "reference")
EXACT = Stabiliser(0.0, "signed")
