"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A is frozen, B is trained and travels."""

import torch

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.layout import A, AdapterLayout


class FFALoRA(FederatedMethod):
    """With A the same for all, the mean of the products is the product of the mean: Σ p_k B_k A = (Σ p_k B_k) A (§3).

    A is random and known by the run's seed, also after a stage has fused it, so it never travels (our choice).

    Raises:
        ValueError: an adapter on embeddings.
    """

    partial = factors = True

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        if any("lora_embedding" in key for key in layout.keys):
            raise ValueError(
                "ffa_lora freezes A, which PEFT starts at zero on embeddings: leave them out of `target_modules`."
            )
        super().begin_stage(layout, adapter)

    def receives(self, client: int) -> tuple[int, ...]:
        return self.layout.without(A)

    def trains(self, client: int) -> tuple[int, ...]:
        return self.layout.without(A)
