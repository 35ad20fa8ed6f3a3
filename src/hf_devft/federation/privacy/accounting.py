"""How much privacy a run's rounds cost: ε at a δ, by Google's dp-accounting."""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, groupby
from typing import Any, Protocol


# Whom a run protects: a client with all its rows, or each of them.
LEVELS = ("client", "record")
# How a round's clients are drawn, as it is accounted for.
SAMPLINGS = ("poisson", "fixed_size")
# Of the losses that are convolved; rounded so that ε is never too small, by 1e-3 per round at the most (the library's
# 1e-4 is 20 times slower; our choice).
_LOSS_STEP = 1e-3


class Accountant(Protocol):
    """Says what ε rounds add up to.

    Attributes:
        noise_multiplier: standard deviation of the noise, in clipping norms.
        delta: δ.
    """

    @property
    def noise_multiplier(self) -> float:
        """Of the noise."""
        ...

    @property
    def delta(self) -> float:
        """δ."""
        ...

    def epsilon(self, draws: Iterable[Any]) -> float:
        """Return ε after some rounds, of which each is said how its clients are drawn."""
        ...


@dataclass(frozen=True)
class ClientAccountant:
    """Says what ε rounds of DP-FedAvg add up to.

    With Poisson sampling, two runs are neighbours where one has a client more (all its rows); privacy loss
    distributions give ε (Koskela et al. 2020, arXiv 1906.03049). With a fixed number of clients they are where one
    client has other rows, so that a sum differs by twice the clipping norm; Rényi divergences give ε (Wang et al.
    2019, arXiv 1808.00087).

    Attributes:
        noise_multiplier: standard deviation of the noise in a round's sum, in clipping norms.
        clients_per_round: on average, or just as many.
        sampling: one of `SAMPLINGS`.
        delta: δ.
    """

    noise_multiplier: float
    clients_per_round: int
    sampling: str = "poisson"
    delta: float = 1e-5

    def epsilon(self, draws: Iterable[int]) -> float:
        """Return ε after some rounds.

        Args:
            draws: of each round, the number of clients that it draws from.
        """
        counts = tuple((size, len(list(rounds))) for size, rounds in groupby(sorted(draws)))
        return _epsilon(self, counts) if counts else 0.0


@dataclass(frozen=True)
class RecordAccountant:
    """Says what ε rounds of DP-SGD within clients add up to, for a row of the client that it costs most.

    Two runs are neighbours where a client has a row more; each of its steps is a Poisson-sampled Gaussian mechanism
    on its rows, and other clients' steps cost it nothing. Everybody knows who takes part.

    Attributes:
        noise_multiplier: standard deviation of the noise in a step's sum, in clipping norms.
        examples: how many rows each client has.
        batch_size: how many of them a step has on average. steps: of a client in a round.
        delta: δ.
    """

    noise_multiplier: float
    examples: tuple[int, ...]
    batch_size: int
    steps: int
    delta: float = 1e-5

    def epsilon(self, draws: Iterable[Sequence[int]]) -> float:
        """Return ε after some rounds.

        Args:
            draws: of each round, the clients that take part.
        """
        rounds = Counter(chain.from_iterable(draws))
        turns = sorted({(self.examples[client], count) for client, count in rounds.items()})
        # Of clients with as many rows or more, only those that take part more often can cost more.
        most = [0, *accumulate((count for _, count in turns), max)]
        dear = [turn for turn, before in zip(turns, most, strict=False) if turn[1] > before]
        return max((self._of_a_row(size, count) for size, count in dear), default=0.0)

    def _of_a_row(self, size: int, rounds: int) -> float:
        """ε for a row of a client with `size` of them."""
        step = ClientAccountant(self.noise_multiplier, min(self.batch_size, size), delta=self.delta)
        return _epsilon(step, ((size, rounds * self.steps),))


def affordable(accountant: Accountant, draws: Sequence[Any], target: float) -> int:
    """Count the first rounds that stay within a budget of ε."""
    return bisect_right(range(1, len(draws) + 1), target, key=lambda count: accountant.epsilon(draws[:count]))


def find_noise_multiplier(target: float, draws: Sequence[Any], make: Callable[[float], Accountant]) -> float:
    """Find the least noise, to three digits, with which rounds stay within a budget of ε.

    Args:
        draws: of each round, as the accountant has it. make: (noise multiplier) -> an accountant.
    """

    def fits(noise_multiplier: float) -> bool:
        return make(noise_multiplier).epsilon(draws) <= target

    enough = 1.0
    while not fits(enough):
        enough *= 2
    too_little = enough / 2
    while fits(too_little):
        too_little, enough = too_little / 2, too_little
    while enough - too_little > 1e-3 * enough:
        middle = (enough + too_little) / 2
        too_little, enough = (too_little, middle) if fits(middle) else (middle, enough)
    return enough


@lru_cache(maxsize=4096)
def _epsilon(accountant: ClientAccountant, counts: tuple[tuple[int, int], ...]) -> float:
    """ε of rounds, counted by the population that they draw from."""
    dp, pld, rdp = _libraries()
    size, z = accountant.clients_per_round, accountant.noise_multiplier
    if accountant.sampling == "poisson":
        account = pld.PLDAccountant(value_discretization_interval=_LOSS_STEP)
    else:
        account = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for population, rounds in counts:
        if accountant.sampling == "poisson":
            event = dp.PoissonSampledDpEvent(size / population, dp.GaussianDpEvent(z))
        else:
            event = dp.SampledWithoutReplacementDpEvent(population, size, dp.GaussianDpEvent(z / 2))
        account.compose(event, rounds)
    return float(account.get_epsilon(accountant.delta))


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ImportError(
            "dp-accounting is not installed: pip install 'hf-devft[privacy]', in a clone '.[privacy]'"
        ) from error
    # It warns of each order of Rényi's divergence that it leaves out, where ε is found by others.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return dp_accounting, pld, rdp
