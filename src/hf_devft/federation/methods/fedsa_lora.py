"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): A learns what is common and is shared, B stays with its client."""

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.models.layout import B


class FedSALoRA(FederatedMethod):
    """Both are trained, A ← Σ p_k A_k is aggregated (§3.2), and client k goes on with its own B_k.

    What else is trained, such as a head, is shared, too. At a stage change every client carries its own B_k from depth
    to depth, as the server does with A (our choices).
    """

    factors = remembers = averages = True

    def receives(self, client: int) -> tuple[int, ...]:
        return self.layout.without(B)

    def sends(self, client: int) -> tuple[int, ...]:
        return self.layout.without(B)
