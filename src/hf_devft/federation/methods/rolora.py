"""RoLoRA (Chen et al. 2024, arXiv 2502.01755): A and B are trained in turns."""

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.models.layout import A, B


class RoLoRA(FederatedMethod):
    """Odd rounds train B with A frozen, even rounds A with B frozen (Algorithm 1), so that each mean of the products
    is the product of the means.

    What was trained is sent; both are received, as a client that was not in the last rounds has neither (our choice).
    Our first round trains B, as A has no gradient where B is still zero.
    """

    partial = factors = averages = True
    supports_late_updates = False

    def trains(self, client: int) -> tuple[int, ...]:
        return self.layout.without(A if self.round_index % 2 == 0 else B)
