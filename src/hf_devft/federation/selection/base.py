"""Which clients take part in a round: the base of all rules, uniform, and by data size."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_devft.federation.heterogeneity.clock import Work
from hf_devft.federation.heterogeneity.resources import ClientResources
from hf_devft.federation.sampling import sample_clients


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

    def seconds(self, round_index: int) -> float:
        """Return how long the round takes by the simulated clock, 0 without one."""
        return self.rounds[round_index].seconds if round_index in self.rounds else 0.0

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
        return np.random.default_rng([self.seed, round_index, client, attempt]).random() < self.dropout_rate


class BySize(ClientSelection):
    """Clients with more data are asked more often, in proportion to their examples."""

    def weights(self) -> Sequence[float]:
        return [self.examples[client] for client in self.candidates]
