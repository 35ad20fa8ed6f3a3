"""Who takes part in a round: functions of (seed, round, attempt, client) only, never of the process they run on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_devft.federation.heterogeneity.clock import Work
from hf_devft.federation.heterogeneity.resources import ClientResources


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


def local_trainings(
    selection: "ClientSelection", placement: Placement, rounds: Iterable[int], attempt: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield (round, client) of every local training that is this process's, in order."""
    for round_index in rounds:
        for client in placement.clients(selection.training(round_index, attempt)):
            yield round_index, client


@dataclass
class Round:
    """A round as it is planned.

    Attributes:
        sampled: the clients that are sent the adapter; training: those of them that are heard of again.
        late: those of them whose update arrives after the round, and in which round.
        seconds: of the simulated clock; 0 where there is none.
    """

    sampled: list[int]
    training: list[int]
    late: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


class ClientSelection:
    """Uniform sampling.

    All is a function of the seed, the round, the stage's work and the clock at its start, so that every process, and a
    resumed run, plans the same.

    Attributes:
        needs_resources: whether clients' resources must be known.
    """

    needs_resources = False

    def begin_run(
        self,
        clients_per_round: int,
        examples: Sequence[int],
        dropout_rate: float,
        seed: int,
        resources: Sequence[ClientResources] | None,
    ) -> None:
        """Take note of who takes part; called once, before anything else.

        Args:
            dropout_rate: probability that a sampled client receives the adapter but is not heard of again.
            resources: the clients', for a simulated clock; or None.
        """
        self.clients_per_round, self.examples = clients_per_round, examples
        self.dropout_rate, self.seed, self.resources = dropout_rate, seed, resources

    def begin_stage(self, candidates: Sequence[int], rounds: range, work: Work | None, clock: float) -> None:
        """Begin a stage; with a clock, plan its rounds.

        Args:
            candidates: the clients that can take part in it.
            rounds: all of the stage's.
            work: of a client in a round; None without a clock.
            clock: seconds so far.
        """
        self.candidates, self.work, self.clock = candidates, work, clock
        self.rounds: dict[int, Round] = {}
        if self.resources is not None:
            for index in rounds:
                self.rounds[index] = self.plan(index)
                self.clock += self.rounds[index].seconds

    def sampled(self, round_index: int, attempt: int = 0) -> list[int]:
        """Return the clients that a round asks; in further attempts others."""
        if attempt == 0 and round_index in self.rounds:
            return self.rounds[round_index].sampled
        return self.sample(round_index, attempt)

    def training(self, round_index: int, attempt: int = 0) -> list[int]:
        """Return those of a round's clients that do not drop out."""
        if attempt == 0 and round_index in self.rounds:
            return self.rounds[round_index].training
        return [c for c in self.sample(round_index, attempt) if not self.drops_out(round_index, attempt, c)]

    def late(self, round_index: int, attempt: int = 0) -> dict[int, int]:
        """Return the clients whose update arrives after the round, and in which round."""
        return self.rounds[round_index].late if attempt == 0 and round_index in self.rounds else {}

    def arrivals(self, round_index: int) -> dict[int, int]:
        """Return the clients whose late update arrives in a round, and in which round they began."""
        began = ((index, client, arrives) for index, r in self.rounds.items() for client, arrives in r.late.items())
        return {client: index for index, client, arrives in began if arrives == round_index}

    def seconds(self, round_index: int, attempt: int = 0) -> float:
        """Return how long an attempt of the round takes by the simulated clock, 0 without one."""
        if round_index not in self.rounds:
            return 0.0
        if attempt == 0:
            return self.rounds[round_index].seconds
        return max(map(self.seconds_of, self.training(round_index, attempt)), default=0.0)

    def most_in_time(self, clients_per_round: int) -> int:
        """Return how many of a round's clients it waits for."""
        return clients_per_round

    def weights(self) -> Sequence[float] | None:
        """Return what the candidates' chances are in proportion to; None for all alike."""
        return None

    def sample(self, round_index: int, attempt: int = 0) -> list[int]:
        """Draw a round's clients by `weights`."""
        return sample_clients(self.candidates, self.clients_per_round, self.seed, round_index, attempt, self.weights())

    def plan(self, round_index: int) -> Round:
        """Plan a round by the simulated clock: it lasts until the last client has answered."""
        sampled = self.sample(round_index)
        training = [client for client in sampled if not self.drops_out(round_index, 0, client)]
        return Round(sampled, training, seconds=max(map(self.seconds_of, training), default=0.0))

    def seconds_of(self, client: int) -> float:
        """Return how long a client needs for a round, by its resources."""
        return self.resources[client].seconds(self.work.flops[client], self.work.sent[client])

    def drops_out(self, round_index: int, attempt: int, client: int) -> bool:
        """Draw whether a client is not heard of again."""
        # The last word keeps it apart from the draws of who is sampled: zeros at the end of a seed change nothing.
        return np.random.default_rng([self.seed, round_index, client, attempt, 1]).random() < self.dropout_rate
