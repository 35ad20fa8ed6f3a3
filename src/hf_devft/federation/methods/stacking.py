"""For methods that need all updates of a round at once."""

from collections.abc import Callable, Sequence

import torch

from hf_devft.federation.methods.base import FederatedMethod


class Stacking(FederatedMethod):
    """Holds the adapters of all clients of a round, one row each: memory grows with their number."""

    # Two rounds need not have the same coordinates.
    supports_error_feedback = optimizable = supports_late_updates = False

    def begin_round(self, round_index: int, adapter: torch.Tensor, sampled: Sequence[int]) -> None:
        super().begin_round(round_index, adapter, sampled)
        self.rows = self.zeros(len(sampled) * (adapter.numel() + 1)).view(len(sampled), -1)

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        row = self.rows[self.sampled.index(client)]
        row[:-1] = self.unpacked(client, payload)
        row[-1] = self.clients.examples[client]

    def unpacked(self, client: int, payload: torch.Tensor) -> torch.Tensor:
        """A client's adapter as the server sees it."""
        return payload

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        add_up(self.rows)

    def mean(self, place: int, adapters: Sequence, weights: Sequence[float]) -> torch.Tensor:
        """Σ p_k of the clients' tensors at a place."""
        return sum((w * parts[place] for w, parts in zip(weights, adapters, strict=True)), torch.zeros(()))

    def received(self) -> tuple[list[list[torch.Tensor]], list[float]]:
        """The tensors of each client that counted, in their shapes, and p_k = n_k / Σ n_k."""
        rows = self.rows[self.rows[:, -1] > 0]
        weights = rows[:, -1] / rows[:, -1].sum()
        return [self.layout.cut(row) for row in rows[:, :-1]], weights.tolist()
