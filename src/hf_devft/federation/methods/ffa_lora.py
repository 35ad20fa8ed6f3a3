"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A is frozen, B is trained and travels."""

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.models.layout import A


class FFALoRA(FederatedMethod):
    """With A the same for all, the mean of the products is the product of the mean: Σ p_k B_k A = (Σ p_k B_k) A (§3).

    A is random and known by the run's seed, also after a stage has fused it, so it never travels (our choice).
    """

    partial = factors = averages = True

    def receives(self, client: int) -> tuple[int, ...]:
        return self.layout.without(A)

    def trains(self, client: int) -> tuple[int, ...]:
        return self.layout.without(A)

    @property
    def untransmitted(self) -> tuple[int, ...]:
        return self.layout.named(A)
