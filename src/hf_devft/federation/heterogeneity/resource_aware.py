"""REFL: clients that will soon be gone are asked first, and updates may come late."""

import math
from collections.abc import Sequence

import numpy as np

from hf_devft.federation.heterogeneity.clock import Work
from hf_devft.federation.sampling import ClientSelection, Round, sample_clients


class ResourceAware(ClientSelection):
    """REFL (Abdelmoniem et al. 2023, arXiv 2111.01108): clients that will soon be gone come first, nobody is waited
    for for long, and what comes late still counts.

    Of the clients that are there and not at work, those are asked that will least be there in the time after this
    round (§4.1; from the given times, where the paper predicts them; equals in random order). The round is over when
    the part `wait_for` of them has answered; the others' updates count in the round in which they arrive (see
    `late_weights`), if that is no more than `max_staleness` rounds later. A client that leaves before it is done is
    not heard of again. A round that is tried again asks any others, wherever they are (our choice).

    Args:
        wait_for: default 0.5. max_staleness: default 5 rounds (our choices).

    Raises:
        ValueError: a part outside of (0, 1], or a negative number of rounds.
    """

    needs_resources = True

    def __init__(self, wait_for: float = 0.5, max_staleness: int = 5):
        if not 0 < wait_for <= 1 or max_staleness < 0:
            raise ValueError(
                f"wait_for={wait_for}, max_staleness={max_staleness}: give a part above 0, up to 1, and 0 rounds or "
                "more."
            )
        self.wait_for, self.max_staleness = wait_for, max_staleness

    def most_in_time(self, clients_per_round: int) -> int:
        return max(1, math.ceil(self.wait_for * clients_per_round))

    def begin_stage(self, candidates: Sequence[int], rounds: range, work: Work | None, clock: float) -> None:
        self._busy_until = dict.fromkeys(candidates, clock)
        self._waiting: list[tuple[float, int, int]] = []  # (arrival, client, round) of late updates
        super().begin_stage(candidates, rounds, work, clock)
        for planned in self.rounds.values():  # nobody waits for those that the stage's end finds on their way
            lost = {client for client, arrives in planned.late.items() if arrives < 0}
            planned.training = [client for client in planned.training if client not in lost]
            planned.late = {client: arrives for client, arrives in planned.late.items() if client not in lost}

    def sample(self, round_index: int, attempt: int = 0) -> list[int]:
        asked = self.rounds[round_index].sampled if attempt and round_index in self.rounds else []
        others = [client for client in self.candidates if client not in asked]
        if not asked or len(others) < self.clients_per_round:
            return super().sample(round_index, attempt)
        return sample_clients(others, self.clients_per_round, self.seed, round_index, attempt - 1)

    def plan(self, round_index: int) -> Round:
        begin = self._first_moment_with_enough(self.clock)
        there = [client for client in self.candidates if self._is_free(client, begin)]
        expected = self._expected_seconds()
        order = np.random.default_rng([self.seed, round_index]).permutation(len(there))
        later = [self.resources[client].share_there(begin + expected, begin + 2 * expected) for client in there]
        chosen = sorted(sorted(order.tolist(), key=lambda index: later[index])[: self.clients_per_round])
        sampled = [there[index] for index in chosen]
        done = {client: begin + self.seconds_of(client) for client in sampled}
        staying = [
            client
            for client in sampled
            if done[client] <= self.resources[client].stays_until(begin) and not self.drops_out(round_index, 0, client)
        ]
        for client in sampled:
            self._busy_until[client] = done[client] if client in staying else begin
        answers = sorted(done[client] for client in staying)
        end = answers[max(0, math.ceil(self.wait_for * len(answers)) - 1)] if answers else begin + expected
        late = {client: -1 for client in staying if done[client] > end}
        self._deliver(round_index, end)
        self._waiting += [(done[client], client, round_index) for client in late]
        return Round(sampled, staying, late, seconds=end - self.clock)

    def _deliver(self, round_index: int, end: float) -> None:
        """Late updates that arrive before this round's end are counted in it, unless they are too old."""
        for arrival, client, begun in list(self._waiting):
            if arrival <= end and round_index - begun <= self.max_staleness:
                self._waiting.remove((arrival, client, begun))
                self.rounds[begun].late[client] = round_index

    def _first_moment_with_enough(self, time: float) -> float:
        """When as many clients as a round asks are there and free; where that is never in a period, when most are."""
        last = time + max(self.resources[client].period for client in self.candidates)
        most, moment = 0, time
        while most < self.clients_per_round and time <= last:
            free = [client for client in self.candidates if self._is_free(client, time)]
            if len(free) > most:
                most, moment = len(free), time
            time = min(self._next_chance(client, time) for client in self.candidates)
        return moment

    def _next_chance(self, client: int, time: float) -> float:
        """The next moment after `time` at which a client that is not there, or at work, becomes free."""
        resources = self.resources[client]
        if self._is_free(client, time):
            time = resources.stays_until(time)
            return math.inf if math.isinf(time) else resources.there_from(time)
        return resources.there_from(max(time, self._busy_until[client]))

    def _is_free(self, client: int, time: float) -> bool:
        return self._busy_until[client] <= time and self.resources[client].is_there(time)

    def _expected_seconds(self) -> float:
        """Of a round: the mean of those so far, or the median client's work."""
        planned = [one.seconds for one in self.rounds.values()]
        return max(1e-3, float(np.mean(planned) if planned else np.median([*map(self.seconds_of, self.candidates)])))
