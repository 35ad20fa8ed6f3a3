"""Who takes part in a round: functions of (seed, round, attempt, client) only, never of the process they run on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def sample_clients(num_clients: int, count: int, seed: int, round_index: int, attempt: int = 0) -> list[int]:
    """`count` distinct clients of a round, uniformly, ascending.

    Args:
        attempt: 0, and more where the round is tried again: with clients that were in none of its attempts so far,
            or with any where too few are left.
    """
    untried = np.arange(num_clients)
    for number in range(attempt + 1):
        rng = np.random.default_rng([seed, round_index, number] if number else [seed, round_index])
        chosen = rng.choice(untried if len(untried) >= count else num_clients, size=count, replace=False)
        untried = np.setdiff1d(untried, chosen)
    return sorted(chosen.tolist())


def client_seed(seed: int, round_index: int, client: int) -> int:
    """A 32-bit seed for everything random that a client does in a round, on whichever process it runs."""
    return int(np.random.SeedSequence([seed, round_index, client]).generate_state(1)[0])


@dataclass(frozen=True)
class ClientSampling:
    """The clients of every round.

    Attributes:
        num_clients, clients_per_round: how many there are, and how many of them a round samples.
        dropout_rate: probability that a sampled client receives the adapter but is not heard of again.
        seed: the run's.
    """

    num_clients: int
    clients_per_round: int
    dropout_rate: float
    seed: int

    def sampled(self, round_index: int, attempt: int = 0) -> list[int]:
        """All clients of a round."""
        return sample_clients(self.num_clients, self.clients_per_round, self.seed, round_index, attempt)

    def training(self, round_index: int, attempt: int = 0) -> list[int]:
        """Those of them that do not drop out."""
        return [c for c in self.sampled(round_index, attempt) if not self._drops_out(round_index, attempt, c)]

    def _drops_out(self, round_index: int, attempt: int, client: int) -> bool:
        return np.random.default_rng([self.seed, round_index, client, attempt]).random() < self.dropout_rate


@dataclass(frozen=True)
class Placement:
    """Which work is this process's.

    Attributes:
        kind: "client_parallel" (each process trains its share of a round's clients) or "data_parallel" (all processes
            train each client together, each on its share of every batch).
        index, count: this process, and how many there are.
    """

    kind: str = "client_parallel"
    index: int = 0
    count: int = 1

    @property
    def outlives_errors(self) -> bool:
        """Whether a client can fail alone: not where other processes or DeepSpeed stand in the middle of its step."""
        return self.kind == "client_parallel"

    @property
    def shares_batches(self) -> bool:
        """Whether several processes train a client together."""
        return self.kind == "data_parallel" and self.count > 1

    def clients(self, training: Sequence[int]) -> list[int]:
        """This process's share of a round's clients; may be empty."""
        return list(training[self.index :: self.count] if self.kind == "client_parallel" else training)

    def rows(self, batch: list[int]) -> list[int]:
        """This process's share of a batch; may be empty."""
        return batch[self.index :: self.count] if self.shares_batches else batch


def turns(
    sampling: ClientSampling, placement: Placement, rounds: Iterable[int], attempt: int = 0
) -> Iterator[tuple[int, int]]:
    """(round, client) of every local training that is this process's, in order."""
    for round_index in rounds:
        for client in placement.clients(sampling.training(round_index, attempt)):
            yield round_index, client
