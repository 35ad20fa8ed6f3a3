"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): clients of different ranks by truncation and zero-padding."""

from collections.abc import Sequence

import torch

from hf_devft.federation.methods.heterogeneous import HeterogeneousRanks
from hf_devft.federation.methods.lora import product_norm


class HetLoRA(HeterogeneousRanks):
    """Truncation, rank self-pruning and sparsity-weighted aggregation (§3).

    Clients receive their first r_k ranks. Their loss has λ ‖B_tail‖ ‖A_tail‖ added for every module, over the tail
    [γ r_k, r_k) of the ranks; where training made the sum of these products smaller, the client drops its tail for
    good. Adapters are padded with zeros and averaged module by module with weights ‖B_k A_k‖_F: ranks that none of a
    round's clients has become zero, in A and B alike, as in the paper. Neither then has a gradient, so that such a
    rank is never learned again: `flexlora` and `hlora` lose less with few clients a round.

    Args:
        client_ranks: see `HeterogeneousRanks`.
        gamma: γ, default 0.99: at least one rank at a time. prune_weight: λ, default 1e-3 (our choices).
    """

    corrects = True

    def __init__(self, client_ranks: Sequence[int] | None = None, gamma: float = 0.99, prune_weight: float = 1e-3):
        super().__init__(client_ranks)
        if not 0 < gamma < 1 or prune_weight < 0:
            raise ValueError(f"gamma={gamma}, prune_weight={prune_weight}: give 0 < gamma < 1 and prune_weight >= 0.")
        self.gamma, self.prune_weight = gamma, prune_weight
        self._pruned: dict[int, int] = {}

    def begin_round(self, round_index: int, adapter: torch.Tensor, sampled: Sequence[int]) -> None:
        super().begin_round(round_index, adapter, sampled)
        self._pruned = {}

    def rank(self, client: int) -> int:
        """r_k, as far as it has been pruned."""
        return self._pruned.get(client, self._received_rank(client))

    def _received_rank(self, client: int) -> int:
        """The ranks that the client has received in this round, before it prunes any."""
        state = self.memory.get(client, "rank")
        return super().rank(client) if state is None else int(state["rank"])

    def start(self, client: int, received: torch.Tensor) -> torch.Tensor:
        return self.padded(received, self._received_rank(client))

    def _tail(self, client: int) -> slice:
        rank = self.rank(client)
        return slice(max(1, int(self.gamma * rank)), rank)

    def _tail_norms(self, client: int, adapter: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(‖A_tail‖, ‖B_tail‖) of every module."""
        parts, tail = self.layout.cut(adapter), self._tail(client)
        return [(parts[pair.a][tail].norm(), parts[pair.b][:, tail].norm()) for pair in self.layout.pairs]

    def local_gradient(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(adapter)
        parts, grads, tail = self.layout.cut(adapter), self.layout.cut(gradient), self._tail(client)
        for pair, (a, b) in zip(self.layout.pairs, self._tail_norms(client, adapter), strict=True):
            if a > 0 and b > 0:
                grads[pair.a][tail] = self.prune_weight * b / a * parts[pair.a][tail]
                grads[pair.b][:, tail] = self.prune_weight * a / b * parts[pair.b][:, tail]
        return gradient

    def keep(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> None:
        before, after = (sum(a * b for a, b in self._tail_norms(client, x)) for x in (start, adapter))
        tail = self._tail(client)
        if after < before and tail.start < tail.stop:
            self._pruned[client] = tail.start
            self.memory.put(client, "rank", {"rank": torch.tensor(tail.start)})

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        padded = self.unpacked(client, self.from_exact(client, start, payload))
        difference, parts = padded - self.wide(self.adapter), self.layout.cut(padded)
        for pair in self.layout.pairs:
            places = sorted((pair.a, pair.b))
            weight = product_norm(parts[pair.a], parts[pair.b]).item()
            self.add(places, self.layout.pick(difference, places), weight)
        others = self.layout.others
        self.add(others, self.layout.pick(difference, others), self.clients.examples[client])
