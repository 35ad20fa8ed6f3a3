"""What a method adds to local training, whatever it is that travels."""

from collections.abc import Callable

import torch

from hf_devft.federation.methods.base import Clients
from hf_devft.models.layout import AdapterLayout


class LocalCorrection:
    """Corrects the gradients of the clients' local steps.

    Attributes:
        records: whether `payload` is to be given the mean gradient.
    """

    records = False

    def begin_run(self, clients: Clients) -> None:
        """Take note of who takes part; called once, before anything else."""
        self.clients, self.memory = clients, clients.memory

    def begin_stage(self, layout: AdapterLayout) -> None:
        """Begin a stage, with adapters of this layout."""
        self.layout = layout

    def begin_round(self, adapter: torch.Tensor) -> None:
        """Begin a round from the global adapter."""

    def download(self) -> torch.Tensor | None:
        """What every client is sent beside the adapter."""
        return None

    def arrive(self, received: torch.Tensor) -> None:
        """Take note of what the clients get of `download`, after the wire."""

    def gradient(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        """What is added to the gradient at `adapter`, in each step of a client that started from `start`."""
        raise NotImplementedError

    def payload(self, client: int, mean_gradient: torch.Tensor | None) -> torch.Tensor | None:
        """What the client sends beside its adapter, given the mean of its steps' gradients before correction."""
        return None

    def keep(self, client: int, mean_gradient: torch.Tensor) -> None:
        """Remember what stays with a client whose payload will count."""

    def receive(self, client: int, payload: torch.Tensor) -> None:
        """Add a client's payload to the server's sum."""

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        """Put the processes' sums together; called once on each, after its clients. `add_up` sums a tensor over the
        processes, in place."""

    def end_round(self) -> None:
        """End a round: all clients' payloads are in the sum."""
