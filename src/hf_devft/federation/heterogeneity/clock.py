"""A simulated clock, by the speeds and bandwidths of the clients, and under `resource_aware` their times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_devft.federation.memory import SERVER, Memory


@dataclass
class Work:
    """What a stage asks of a client in a round.

    Attributes:
        flops: of each client; sent: bytes, both ways, of each.
    """

    flops: Sequence[float]
    sent: Sequence[float]


class SimulatedClock:
    """The time since the run began, in simulated seconds.

    A stage's rounds are planned by the time at its start, so that is remembered with the server: a resumed run plans
    the same.

    Args:
        memory: where it is remembered.
        runs: whether there is a clock at all, that is, whether the clients' resources are known.
    """

    def __init__(self, memory: Memory, runs: bool):
        self._memory, self._runs = memory, runs
        self.time = self.remembered()

    def remember(self) -> None:
        """Keep the time for the next stage to begin by."""
        if self._runs:
            self._memory.put(SERVER, "clock", {"seconds": torch.tensor(self.time, dtype=torch.float64)})
            self._memory.commit()

    def remembered(self) -> float:
        """The time that was kept last; 0 before that."""
        clock = self._memory.get(SERVER, "clock")
        return clock["seconds"].item() if clock else 0.0
