"""Clients of different LoRA ranks."""

from collections.abc import Sequence

import torch

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.models.layout import AdapterLayout


class HeterogeneousRanks(FederatedMethod):
    """Client k trains the first r_k ranks of every adapter and neither receives nor sends the others.

    The others are zero in both factors, where they have no gradient, so that they stay zero.

    Args:
        client_ranks: r_k, for the clients in turns; default a quarter, a half and all of LoRA's r (our choice).

    Raises:
        ValueError: ranks outside of 1 ... r.
    """

    supports_late_updates = False
    products = True

    def __init__(self, client_ranks: Sequence[int] | None = None):
        if client_ranks is not None and not len(client_ranks):
            raise ValueError("client_ranks=[]: give a rank or more.")
        self.client_ranks = None if client_ranks is None else [int(rank) for rank in client_ranks]

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        super().begin_stage(layout, adapter)
        self.max_rank = max((layout.shapes[pair.a][0] for pair in layout.pairs), default=0)
        ranks = self.client_ranks or [max(1, self.max_rank // 4), max(1, self.max_rank // 2), self.max_rank]
        if not all(1 <= rank <= self.max_rank for rank in ranks):
            raise ValueError(f"client_ranks={ranks}: give ranks from 1 to LoRA's r={self.max_rank}.")
        self._ranks = ranks
        # Of each value, which of the ranks it belongs to.
        parts = [torch.zeros(shape, dtype=torch.long) for shape in layout.shapes]  # what is no factor, everyone has
        for pair in layout.pairs:
            (rank, _), shape = layout.shapes[pair.a], layout.shapes[pair.b]
            parts[pair.a] = torch.arange(rank)[:, None].expand(layout.shapes[pair.a])
            parts[pair.b] = torch.arange(rank).expand(shape)
        self._rank_of_value = torch.cat([part.flatten() for part in parts]).to(adapter.device)
        self._values = {rank: int((self._rank_of_value < rank).sum()) for rank in set(ranks)}

    def rank(self, client: int) -> int:
        """r_k."""
        return self._ranks[client % len(self._ranks)]

    def message_sizes(self, client: int) -> tuple[int, int]:
        rank = HeterogeneousRanks.rank(self, client)  # as configured, so that a resumed run plans the same
        return self._values[rank], self._values[rank]

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        super().receive(client, start, self.from_exact(client, start, payload))

    def from_exact(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> torch.Tensor:
        """The payload, in float64, as if the client had started from the global adapter itself, not from what the wire
        made of it: else each round would begin where that was rounded to, and small steps would be lost."""
        change = self.wide(payload) - self.wide(self.payload(client, start))
        return self.wide(self.payload(client, self.adapter)) + change

    def download(self, client: int) -> torch.Tensor:
        return self.payload(client, self.adapter)

    def start(self, client: int, received: torch.Tensor) -> torch.Tensor:
        return self.padded(received, self.rank(client))

    def payload(self, client: int, adapter: torch.Tensor) -> torch.Tensor:
        return adapter[self._rank_of_value < self.rank(client)]

    def unpacked(self, client: int, payload: torch.Tensor) -> torch.Tensor:
        """The adapter of full rank of which `payload` holds the client's ranks."""
        return self.padded(payload, self.rank(client))

    def padded(self, payload: torch.Tensor, rank: int) -> torch.Tensor:
        """The adapter of full rank of which `payload` holds the first ones; the others are zero."""
        adapter = payload.new_zeros(len(self._rank_of_value))
        adapter[self._rank_of_value < rank] = payload
        return adapter
