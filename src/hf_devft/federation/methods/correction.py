"""What a method adds to local training, whatever it is that travels."""

from collections.abc import Callable

import torch

from hf_devft.federation.methods.base import Clients, FederatedMethod
from hf_devft.models.layout import AdapterLayout


class LocalCorrection:
    """Corrects the gradients of the clients' local steps.

    Attributes:
        records: whether `payload` is to be given the mean gradient.
    """

    records = False

    def begin_run(self, clients: Clients, method: FederatedMethod) -> None:
        """Before anything else.

        Raises:
            ValueError: the correction cannot be combined with `method`.
        """
        self.clients, self.memory = clients, clients.memory

    def begin_stage(self, layout: AdapterLayout) -> None:
        self.layout = layout

    def begin_round(self, adapter: torch.Tensor) -> None:
        """A round begins from the global adapter."""

    def download(self) -> torch.Tensor | None:
        """What every client is sent beside the adapter."""
        return None

    def arrive(self, received: torch.Tensor) -> None:
        """What the clients get of `download`."""

    def gradient(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        """What is added to the gradient at `adapter`, in each step of a client that started from `start`."""
        raise NotImplementedError

    def payload(self, client: int, mean_gradient: torch.Tensor | None) -> torch.Tensor | None:
        """What the client sends beside its adapter, given the mean of its steps' gradients before correction."""
        return None

    def keep(self, client: int, mean_gradient: torch.Tensor) -> None:
        """What the client sends will count: what stays with it."""

    def receive(self, payload: torch.Tensor) -> None:
        """The server takes a client's payload."""

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        """Called once on every process after its clients; `add_up` sums a tensor over the processes, in place."""

    def end_round(self) -> None:
        """All clients have been received."""
