"""FLoRA (Wang et al. 2024, arXiv 2409.05976): stacked adapters, so that aggregation has no error."""

import math

import torch

from hf_devft.federation.methods.residual import Residual
from hf_devft.federation.sampling import client_seed
from hf_devft.models.layout import RESIDUAL


class FLoRA(Residual):
    """ΔW = Σ_k p_k B_k A_k, which is [B_1 ... B_K] times [p_1 A_1; ...; p_K A_K] (eq. 4), goes into the base's
    weights; then every client starts from an adapter of its own, whose product is zero.

    A is drawn as PEFT draws it (Kaiming uniform), by the seed, the round and the client. The stage's adapter is ΔW,
    whose rank grows with the rounds; a next stage goes on from ΔW, fused and transferred like an adapter.
    """

    def _fresh(self, owner: int) -> torch.Tensor:
        """A new adapter, whose product is zero, with all else as it is."""
        generator = torch.Generator().manual_seed(client_seed(self.clients.seed, self.round_index, owner))
        parts = self.layout.cut(self.adapter.clone())
        for pair in self.layout.pairs:
            shape = self.layout.shapes[pair.a]
            parts[pair.a].copy_((torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1]))
            parts[pair.b].zero_()
        return torch.cat([part.flatten() for part in parts])

    def start(self, client: int, received: torch.Tensor) -> torch.Tensor:
        return self._fresh(client)

    def end_round(self) -> torch.Tensor:
        adapters, weights = self.received()
        self.add_residual({
            pair.module + RESIDUAL: self.mean_product(pair, adapters, weights) for pair in self.layout.pairs
        })  # fmt: skip
        fresh = self._fresh(len(self.clients.examples))
        for place in self.layout.others:
            self.layout.put(fresh, (place,), self.mean(place, adapters, weights).flatten())
        return fresh
