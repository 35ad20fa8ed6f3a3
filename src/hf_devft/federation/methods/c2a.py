"""C2A (Kim et al. 2023, arXiv 2311.00573): a hyper-network generates each client's adapter."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_devft.federation.heterogeneity.label_features import label_features
from hf_devft.federation.memory import SERVER
from hf_devft.federation.methods.base import Clients, FederatedMethod
from hf_devft.models.layout import AdapterLayout


class C2A(FederatedMethod):
    """θ_k = h(z_k), z_k an embedding of the client's label distribution (§3.2), h trained by all clients.

    Here h is linear, θ_k = W_0 + Σ_j z_kj W_j (the paper's has two layers and factorised weights, and embeds the texts
    too), and z_k the client's `label_features`. Then a client's steps on W from its loss are steps on θ_k: with plain
    gradients W changes by (θ_k⁺ − θ_k) [1, z_k] up to the learning rate, here divided by 1 + ‖z_k‖², which makes
    h(z_k) = θ_k⁺ for one client. So a client trains and sends θ_k and z_k, and is sent h(z_k) (our choices). What is
    published is h of the mean z.

    Args:
        embedding_size: numbers in z_k, default 4 (our choice).

    Raises:
        ValueError: embedding_size below 1.
    """

    optimizable = supports_late_updates = False
    remembers = True

    def __init__(self, embedding_size: int = 4):
        if embedding_size < 1:
            raise ValueError(f"embedding_size={embedding_size}: give 1 or more.")
        self.embedding_size = embedding_size

    def begin_run(self, clients: Clients) -> None:
        super().begin_run(clients)
        features = label_features(clients.label_counts(), self.embedding_size, clients.seed)
        self.embeddings = np.concatenate([np.ones((len(features), 1)), features], axis=1)  # [1, z_k]
        examples = np.asarray(clients.examples, dtype=float)
        self._mean = examples @ self.embeddings / examples.sum()

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        super().begin_stage(layout, adapter)
        if self.memory.get(SERVER, "weights-0") is None:  # every client starts from the same
            for index in range(self.embedding_size + 1):
                start = adapter if index == 0 else torch.zeros_like(adapter)
                self.memory.put(SERVER, f"weights-{index}", layout.state(start))
            self.memory.commit()

    def is_adapter(self, name: str) -> bool:
        return name == "weights-0"

    def begin_round(self, round_index: int, adapter: torch.Tensor, sampled: Sequence[int]) -> None:
        super().begin_round(round_index, adapter, sampled)
        weights = (self.memory.get(SERVER, f"weights-{index}") for index in range(self.embedding_size + 1))
        self._hyper = torch.stack([self.layout.flat(state) for state in weights]).double().to(self.sums.device)
        self._updates = self.zeros(self._hyper.numel() + 1)  # Σ_k n_k ΔW, and Σ n_k

    def _generate(self, embedding: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(embedding).to(self._hyper) @ self._hyper

    def download(self, client: int) -> torch.Tensor:
        return self._generate(self.embeddings[client]).to(self.adapter)

    @property
    def num_extra_values(self) -> int:
        return self.embedding_size  # z_k

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        change = self.wide(payload) - self.wide(start)
        embedding, count = self.embeddings[client], self.clients.examples[client]
        direction = torch.from_numpy(embedding / (embedding @ embedding)).to(self._updates)
        self._updates[:-1] += count * torch.outer(direction, change.to(direction.device)).flatten()
        self._updates[-1] += count

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        add_up(self._updates)

    def end_round(self) -> torch.Tensor:
        self._hyper += (self._updates[:-1] / self._updates[-1]).view_as(self._hyper)
        for index, weights in enumerate(self._hyper):
            self.memory.put(SERVER, f"weights-{index}", self.layout.state(weights.float()))
        return self._generate(self._mean).float()
