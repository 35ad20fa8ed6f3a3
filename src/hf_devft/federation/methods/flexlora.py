"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505) and HLoRA (Liu et al. 2025, arXiv 2503.00813): clients of different
ranks, brought together by SVD."""

import torch

from hf_devft.federation.methods.heterogeneous import HeterogeneousRanks
from hf_devft.federation.methods.lora import stacked, truncated_product
from hf_devft.federation.methods.stacking import Stacking


class FlexLoRA(HeterogeneousRanks, Stacking):
    """W = Σ_k p_k B_k A_k = U Σ V; client k receives its first r_k ranks: B = U Σ, A = V (§3.2).

    The SVD is taken of the factors; the products are never built. Beyond LoRA's r, which the published adapter has,
    the ranks are cut off.
    """

    def split(self, singular: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors' shares of the singular values, of A and of B; their product is `singular`."""
        return torch.ones_like(singular), singular

    def end_round(self) -> torch.Tensor:
        adapters, weights = self.received()
        parts = self.layout.cut(self.wide(self.adapter))
        for pair in self.layout.pairs:
            left, right = stacked([x[pair.a] for x in adapters], [x[pair.b] for x in adapters], weights)
            u, s, v = truncated_product(left, right, self.max_rank)
            of_a, of_b = self.split(s)
            parts[pair.a], parts[pair.b] = of_a[:, None] * v, u * of_b
        for place in self.layout.others:
            parts[place] = self.mean(place, adapters, weights)
        return torch.cat([part.flatten() for part in parts]).float()


class HLoRA(FlexLoRA):
    """As FlexLoRA, with the singular values shared evenly: B = U √Σ, A = √Σ V (our choice, for factors of like size).

    Ranks that the clients have left empty have V for A and 0 for B, as a new adapter, so that they can be trained.
    """

    def split(self, singular: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        empty = singular <= singular[0] * 1e-7
        return torch.where(empty, 1.0, singular.sqrt()), torch.where(empty, 0.0, singular.sqrt())
