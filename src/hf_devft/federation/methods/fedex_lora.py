"""FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432): FedIT's means, and what they miss goes into the base."""

import torch

from hf_devft.federation.methods.residual import Residual
from hf_devft.models.layout import RESIDUAL


class FedExLoRA(Residual):
    """A ← Ā = Σ p_k A_k, B ← B̄ = Σ p_k B_k, and ΔW ← ΔW + Σ p_k B_k A_k − B̄ Ā (eqs. 11 to 13): exact aggregation.

    A client can make Ā, B̄ and the residual from the factors that the others sent, so these are what it is sent (our
    choice; the residual by itself has the same rank), and the first time of a stage the adapter; or where it has fewer
    values, the dense residual, with the adapter, which does not follow from it.
    """

    supports_error_feedback = starts_from_adapter = True

    def start(self, client: int, received: torch.Tensor) -> torch.Tensor:
        return self.adapter

    def end_round(self) -> torch.Tensor:
        adapters, weights = self.received()
        means = [self.mean(place, adapters, weights) for place in self.layout.all]
        scaling = self.layout.scaling
        self.add_residual({
            pair.module + RESIDUAL: self.mean_product(pair, adapters, weights) - scaling * means[pair.b] @
            means[pair.a] for pair in self.layout.pairs
        })  # fmt: skip
        return torch.cat([mean.flatten() for mean in means]).float()
