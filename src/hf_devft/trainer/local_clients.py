"""The clients of a simulation: all of them are trained here, from the rows of one dataset."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_devft.federation.batches import ClientBatches
from hf_devft.federation.client_side import Answer, ClientSide, Exchange, ToClient, exchange_here
from hf_devft.federation.rounds import Federation
from hf_devft.federation.turns import TrainClients
from hf_devft.trainer.active_stage import ActiveStage
from hf_devft.trainer.federated_run import FederatedRun
from hf_devft.trainer.stage_runner import StageRunner


class LocalClients:
    """Trains the clients of a round in this process, and on the others that each have their share.

    Args:
        side: the clients' half of a round.
        make_runner: makes what trains a stage's clients.
        batches_of: (rounds, attempt) -> the batches of this process's clients in them.
    """

    def __init__(
        self,
        side: ClientSide,
        make_runner: Callable[[ActiveStage], StageRunner],
        batches_of: Callable[[Iterable[int], int], ClientBatches],
    ):
        self._side, self._make_runner, self._batches_of = side, make_runner, batches_of

    def begin_run(self, run: FederatedRun, federation: Federation, processor: Any) -> None:
        """Begin a run; nothing is to be done."""

    def begin_stage(self, active: ActiveStage, rounds: range) -> None:
        """Begin a stage, or go on with it.

        Args:
            rounds: those to come.
        """
        self._runner = self._make_runner(active)
        self._batches = self._batches_of(rounds, 0)

    def may_go_back_to(self, folders: Iterable[Path]) -> None:
        """Keep what clients had at these checkpoints; nothing is to be done, as it is in them."""

    def end_stage(self) -> None:
        """Drop what was made for the stage."""
        del self._runner, self._batches

    def exchange(self, learning_rate: float) -> Exchange:
        """Return what carries messages to the clients and back, in a round with this learning rate."""
        return functools.partial(self._exchange, functools.partial(self._runner.train, learning_rate))

    def _exchange(
        self, train: TrainClients, round_index: int, attempt: int, messages: Iterator[ToClient]
    ) -> Iterator[tuple[ToClient, Answer]]:
        batches = self._batches if attempt == 0 else self._batches_of([round_index], attempt)
        return exchange_here(self._side, train, batches.next_client, messages)
