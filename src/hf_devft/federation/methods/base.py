"""What a federated method has to say."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class FederatedMethod(ABC):
    """Combines the clients' adapters of a round, one at a time, so that memory does not grow with their number.

    An adapter is one flat vector of all trainable parameters (see `AdapterLayout`). Each process receives the adapters
    of the clients that it trained; `merge` puts the processes together.
    """

    @abstractmethod
    def begin_round(self, start: torch.Tensor) -> None:
        """A round begins from the global adapter `start`."""

    @abstractmethod
    def receive(self, adapter: torch.Tensor, num_examples: int) -> None:
        """A client of `num_examples` examples returns its adapter. The tensor is reused: do not keep it."""

    @abstractmethod
    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        """Called once on every process after its clients; `add_up` sums a tensor over the processes, in place."""

    @abstractmethod
    def end_round(self) -> torch.Tensor:
        """The new global adapter, from at least one client's."""

    def bytes_down(self, adapter: torch.Tensor) -> int:
        """Bytes that one client receives in a round."""
        return adapter.nbytes

    def bytes_up(self, adapter: torch.Tensor) -> int:
        """Bytes that one client sends in a round."""
        return adapter.nbytes
