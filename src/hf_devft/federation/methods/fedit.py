"""FedIT (Zhang et al. 2024, arXiv 2305.05644): FedAvg over the clients' LoRA A and B."""

from collections.abc import Callable

import torch

from hf_devft.federation.methods.base import FederatedMethod


class FedIT(FederatedMethod):
    """θ ← Σ_k n_k θ_k / Σ_k n_k, n_k the client's examples (McMahan et al. 2017, arXiv 1602.05629, eq. 1).

    Summed in float64 (our choice: the order of clients, and on which processes they were, then makes no difference
    after rounding), on the CPU where the device has no float64.
    """

    def begin_round(self, start: torch.Tensor) -> None:
        device = "cpu" if start.device.type == "mps" else start.device
        self.sums = torch.zeros(start.numel() + 1, dtype=torch.float64, device=device)  # Σ n_k θ_k and Σ n_k

    def receive(self, adapter: torch.Tensor, num_examples: int) -> None:
        self.sums[:-1].add_(adapter.to(self.sums.device), alpha=num_examples)
        self.sums[-1] += num_examples

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        add_up(self.sums)

    def end_round(self) -> torch.Tensor:
        return (self.sums[:-1] / self.sums[-1]).float()
