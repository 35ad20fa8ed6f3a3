"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates against client drift."""

from collections.abc import Callable

import torch

from hf_devft.federation.memory import SERVER
from hf_devft.federation.methods.base import wide_zeros
from hf_devft.federation.methods.correction import LocalCorrection


class Scaffold(LocalCorrection):
    """Adds c − c_k to a client's gradients (eq. 3), c_k its own control variate and c = Σ_k n_k c_k / Σ_k n_k the
    server's: weighted by their rows n_k as the clients' models are (the paper weights neither; with one weighted and
    the other not, training would end at another objective's optimum).

    After its steps a client takes c_k⁺ = c_k − c + (θ_t − θ_k)/(K η) (option II) and sends c_k⁺ − c_k beside its
    adapter. Under plain SGD that is the mean of its gradients before correction, and we take this mean as it is, so
    that the variates keep the scale of gradients under Adam too (our choice). Control variates start at zero.
    """

    records = True

    def _variate(self, owner: int | str) -> torch.Tensor:
        """c or c_k."""
        if (state := self.memory.get(owner, "control")) is None:
            return torch.zeros(sum(self.layout.sizes))
        return self.layout.flat(state)

    def begin_round(self, adapter: torch.Tensor) -> None:
        self.control = self._variate(SERVER).to(adapter.device)
        self._sum = wide_zeros(self.control.numel(), self.control.device)
        self._current: tuple[int, torch.Tensor] | None = None

    def download(self) -> torch.Tensor:
        return self.control

    def arrive(self, received: torch.Tensor) -> None:
        self._received = received

    def _own(self, client: int) -> torch.Tensor:
        if self._current is None or self._current[0] != client:
            self._current = (client, self._variate(client).to(self.control.device))
        return self._current[1]

    def gradient(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        return self._received - self._own(client)

    def payload(self, client: int, mean_gradient: torch.Tensor) -> torch.Tensor:
        return mean_gradient - self._own(client)

    def keep(self, client: int, mean_gradient: torch.Tensor) -> None:
        self.memory.put(client, "control", self.layout.state(mean_gradient))

    def receive(self, client: int, payload: torch.Tensor) -> None:
        self._sum += self._share(client) * payload.to(self._sum.device)

    def _share(self, client: int) -> float:
        """n_k / Σ n_k; clients that have not said yet how many rows they have count as those that have, on average."""
        examples = self.clients.examples
        known = [count for count in examples if count]
        return examples[client] * len(known) / (sum(known) * len(examples))

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        add_up(self._sum)

    def end_round(self) -> None:
        control = self.control.cpu() + self._sum.float().cpu()
        self.memory.put(SERVER, "control", self.layout.state(control))
