"""Who takes part in a round, and in which order clients see their rows: functions of (seed, round, client) only."""

from collections.abc import Iterator, Sequence

import numpy as np


def sample_clients(num_clients: int, count: int, seed: int, round_index: int) -> list[int]:
    """`count` distinct clients of a round, uniformly, ascending."""
    rng = np.random.default_rng([seed, round_index])
    return sorted(rng.choice(num_clients, size=count, replace=False).tolist())


def client_seed(seed: int, round_index: int, client: int) -> int:
    """A 32-bit seed for everything random that a client does in a round, on whichever process it runs."""
    return int(np.random.SeedSequence([seed, round_index, client]).generate_state(1)[0])


def client_batches(rows: np.ndarray, batch_size: int, drop_last: bool, seed: int) -> Iterator[list[int]]:
    """Endless batches of a client's rows, each pass over them newly shuffled.

    A pass ends with a smaller batch, or without it where `drop_last` (unless it would be the pass's only one).
    """
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(rows))
    while True:
        order = rng.permutation(rows).tolist()
        end = len(order) - len(order) % size if drop_last else len(order)
        yield from (order[start : min(start + size, end)] for start in range(0, end, size))


class FederatedBatchSampler:
    """The batches of all rounds to come, client after client: one sampler, so one data loader, for a whole run.

    Args:
        rows: each client's row indices.
        clients_per_round, batches_per_client, batch_size, drop_last: see `DevFTConfig`.
        seed: chooses the clients.
        data_seed: orders their rows.
        first_round: where to start, for a resumed run.
        num_rounds: where to end.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        clients_per_round: int,
        batches_per_client: int,
        batch_size: int,
        drop_last: bool,
        seed: int,
        data_seed: int,
        first_round: int,
        num_rounds: int,
    ):
        self.rows = rows
        self.clients_per_round = clients_per_round
        self.batches_per_client = batches_per_client
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.data_seed = data_seed
        self.rounds = range(first_round, num_rounds)

    def __len__(self) -> int:
        return len(self.rounds) * self.clients_per_round * self.batches_per_client

    def __iter__(self) -> Iterator[list[int]]:
        for round_index in self.rounds:
            for client in sample_clients(len(self.rows), self.clients_per_round, self.seed, round_index):
                seed = client_seed(self.data_seed, round_index, client)
                batches = client_batches(self.rows[client], self.batch_size, self.drop_last, seed)
                yield from (next(batches) for _ in range(self.batches_per_client))
