"""The rules by which a round's clients are chosen.

To add one of your own: a subclass of `ClientSelection` and `SELECTIONS["mine"] = MySelection`.
"""

from hf_devft.federation.heterogeneity.resource_aware import ResourceAware
from hf_devft.federation.selection.base import BySize, ClientSelection


SELECTIONS: dict[str, type[ClientSelection]] = {
    "uniform": ClientSelection,
    "by_size": BySize,
    "resource_aware": ResourceAware,
}


__all__ = ["SELECTIONS", "BySize", "ClientSelection", "ResourceAware"]
