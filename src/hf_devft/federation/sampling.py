"""Who takes part in a round: functions of (seed, round, attempt, client) only, never of the process they run on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


# How work is placed on processes; see `Placement`.
PLACEMENTS = ("client_parallel", "data_parallel")


def sample_clients(
    clients: Sequence[int],
    count: int,
    seed: int,
    round_index: int,
    attempt: int = 0,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Draw `count` distinct ones of `clients` for a round; returns them ascending.

    Args:
        attempt: 0, and more where the round is tried again: with clients that were in none of its attempts so far,
            or with any where too few are left.
        weights: what each one's chance is in proportion to; uniform by default.
    """
    everyone = untried = np.asarray(clients)
    weight_of = None if weights is None else dict(zip(everyone.tolist(), weights, strict=True))
    for number in range(attempt + 1):
        rng = np.random.default_rng([seed, round_index, number] if number else [seed, round_index])
        pool = untried if len(untried) >= count else everyone
        chances = None if weight_of is None else np.array([weight_of[client] for client in pool.tolist()])
        chosen = rng.choice(pool, size=count, replace=False, p=None if chances is None else chances / chances.sum())
        untried = np.setdiff1d(untried, chosen)
    return sorted(chosen.tolist())


def client_seed(seed: int, round_index: int, client: int) -> int:
    """Return a 32-bit seed for everything random that a client does in a round, on whichever process it runs."""
    return int(np.random.SeedSequence([seed, round_index, client]).generate_state(1)[0])


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
        """Return this process's share of a round's clients; may be empty."""
        return list(training[self.index :: self.count] if self.kind == "client_parallel" else training)

    def rows(self, batch: list[int]) -> list[int]:
        """Return this process's share of a batch; may be empty."""
        return batch[self.index :: self.count] if self.shares_batches else batch


class Plan(Protocol):
    """Who trains in which round."""

    def training(self, round_index: int, attempt: int = 0) -> list[int]:
        """The clients that train in a round, ascending."""


def local_trainings(
    plan: Plan, placement: Placement, rounds: Iterable[int], attempt: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield (round, client) of every local training that is this process's, in order."""
    for round_index in rounds:
        for client in placement.clients(plan.training(round_index, attempt)):
            yield round_index, client
