"""FedIT (Zhang et al. 2024, arXiv 2305.05644): FedAvg over the clients' LoRA A and B."""

import torch

from hf_devft.federation.methods.base import FederatedMethod


class FedIT(FederatedMethod):
    """θ ← Σ_k n_k θ_k / Σ_k n_k, n_k the client's examples (McMahan et al. 2017, arXiv 1602.05629, eq. 1).

    Summed in float64 (our choice: the order of clients then makes no difference after rounding), on the CPU where the
    device has no float64.
    """

    def begin_round(self, start: torch.Tensor) -> None:
        device = "cpu" if start.device.type == "mps" else start.device
        self.total = torch.zeros(start.shape, dtype=torch.float64, device=device)
        self.examples = 0

    def receive(self, adapter: torch.Tensor, num_examples: int) -> None:
        self.total.add_(adapter.to(self.total.device), alpha=num_examples)
        self.examples += num_examples

    def end_round(self) -> torch.Tensor:
        return (self.total / self.examples).float()
