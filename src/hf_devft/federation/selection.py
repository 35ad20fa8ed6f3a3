"""The rules by which a round's clients are chosen.

To add one of your own: a subclass of `ClientSelection` and `SELECTIONS["mine"] = MySelection`.
"""

from collections.abc import Sequence

from hf_devft.federation.heterogeneity.resource_aware import ResourceAware
from hf_devft.federation.sampling import ClientSelection


class BySize(ClientSelection):
    """Clients with more data are asked more often, in proportion to their examples; their updates then count alike
    (Li et al. 2020, arXiv 1907.02189, Scheme I, here without replacement)."""

    def weights(self) -> Sequence[float]:
        # One of which nobody knows yet how many examples it has counts as one.
        return [max(1, self.examples[client]) for client in self.candidates]


SELECTIONS: dict[str, type[ClientSelection]] = {
    "uniform": ClientSelection,
    "by_size": BySize,
    "resource_aware": ResourceAware,
}


__all__ = ["SELECTIONS", "BySize", "ClientSelection", "ResourceAware"]
