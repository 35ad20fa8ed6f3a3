"""Updates that arrive after their round: kept with their client, and counted in the round in which they arrive."""

from collections.abc import Iterable

import torch

from hf_devft.federation.heterogeneity.staleness import late_weights
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import FederatedMethod
from hf_devft.models.layout import AdapterLayout


class LateUpdates:
    """The updates that are on their way, one a client at the most.

    Args:
        memory: where they are kept.
    """

    def __init__(self, memory: Memory):
        self._memory = memory

    def begin_stage(self, layout: AdapterLayout) -> None:
        """Begin a stage, with adapters of this layout."""
        self.layout = layout

    def keep(self, client: int, places: tuple[int, ...], change: torch.Tensor) -> None:
        """Keep what a client has changed of the tensors at `places`."""
        adapter = torch.zeros(sum(self.layout.sizes), dtype=change.dtype, device=change.device)
        self.layout.put(adapter, places, change)
        self._memory.put(client, "late", self.layout.state(adapter, places))

    def arrived(self, begun: dict[int, int], round_index: int) -> dict[int, int]:
        """Of the clients whose update was to arrive in this round, {client: the round in which it was begun}, those
        that have sent one, and how many rounds ago."""
        return {
            client: round_index - index
            for client, index in begun.items()
            if self._memory.get(client, "late") is not None
        }

    def add_to(self, method: FederatedMethod, fresh: int, staleness: dict[int, int]) -> None:
        """Count late updates, {client: rounds ago}, in a round that has `fresh` updates of its own."""
        if not staleness:
            return
        changes = []
        for client in staleness:
            state = self._memory.get(client, "late") or {}
            places = tuple(place for place in self.layout.all if self.layout.keys[place] in state)
            changes.append((client, places, torch.cat([state[self.layout.keys[place]].flatten() for place in places])))
        mean = method.mean_update()
        means = [None if mean is None else self.layout.pick(mean, places).cpu() for _, places, _ in changes]
        weights = late_weights(means, fresh, [change for _, _, change in changes], list(staleness.values()))
        for (client, places, change), weight in zip(changes, weights, strict=True):
            method.add(places, change.double(), weight * method.clients.examples[client])
            self._memory.forget(client, "late")

    def forget(self, clients: Iterable[int]) -> None:
        """Drop what is still on its way."""
        for client in clients:
            self._memory.forget(client, "late")
