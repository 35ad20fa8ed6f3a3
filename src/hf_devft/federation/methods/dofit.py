"""DoFIT (Xu et al. 2024, NeurIPS): domain-aware aggregation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_devft.federation.heterogeneity.label_features import label_features
from hf_devft.federation.memory import SERVER
from hf_devft.federation.methods.base import Clients, FederatedMethod
from hf_devft.federation.methods.lora import product_norm
from hf_devft.models.layout import AdapterLayout


class DoFIT(FederatedMethod):
    """Each domain has a server of its own, which takes the mean over its clients; of the modules that are important to
    every domain, a server above takes the mean over the domains, and each domain goes towards it as far as that does
    not undo what it has just learned.

    Our reading, and our choices: domains are the k-means clusters of the clients' `label_features`, as one dataset
    says nothing of domains; a module's importance is ‖BA‖_F; the less conflicted space is the one orthogonal to the
    domain's own step, wherever the way to the common mean points against that step. What is published is the mean over
    the domains, weighted by examples.

    Args:
        domains: how many, default 2.
        shared: the part of the modules, the most important ones, that each domain offers to share, default 0.5.

    Raises:
        ValueError: fewer than 1 or more than the clients, or a part outside of 0 ... 1.
    """

    optimizable = supports_late_updates = False
    factors = remembers = True

    def __init__(self, domains: int = 2, shared: float = 0.5):
        if domains < 1 or not 0 <= shared <= 1:
            raise ValueError(f"domains={domains}, shared={shared}: give 1 domain or more and a part from 0 to 1.")
        self.domains, self.shared = domains, shared

    def begin_run(self, clients: Clients) -> None:
        from sklearn.cluster import KMeans  # here, as it takes long to import

        super().begin_run(clients)
        if self.domains > len(clients.examples):
            raise ValueError(f"domains={self.domains}, but there are {len(clients.examples)} clients: give fewer.")
        features = label_features(clients.label_counts(), 16, clients.seed)
        self.domain_of = KMeans(self.domains, n_init=10, random_state=clients.seed).fit_predict(features)
        examples = np.asarray(clients.examples, dtype=float)
        self._share = torch.tensor([examples[self.domain_of == d].sum() / examples.sum() for d in range(self.domains)])

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        super().begin_stage(layout, adapter)
        if self.memory.get(SERVER, "domain-0") is None:
            for domain in range(self.domains):
                self.memory.put(SERVER, f"domain-{domain}", layout.state(adapter))
            self.memory.commit()

    def is_adapter(self, name: str) -> bool:
        return name.startswith("domain-")

    def begin_round(self, round_index: int, adapter: torch.Tensor, sampled: Sequence[int]) -> None:
        super().begin_round(round_index, adapter, sampled)
        states = (self.memory.get(SERVER, f"domain-{domain}") for domain in range(self.domains))
        self._adapters = [self.layout.flat(state).to(adapter.device) for state in states]
        self._updates = self.zeros(self.domains * (adapter.numel() + 1)).view(self.domains, -1)

    def download(self, client: int) -> torch.Tensor:
        return self._adapters[self.domain_of[client]]

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        update, count = self._updates[self.domain_of[client]], self.clients.examples[client]
        update[:-1] += count * (self.wide(payload) - self.wide(start))
        update[-1] += count

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        add_up(self._updates)

    def end_round(self) -> torch.Tensor:
        steps = [update[:-1] / update[-1].clamp_min(1) for update in self._updates]
        adapters = [adapter.to(step) + step for adapter, step in zip(self._adapters, steps, strict=True)]
        share = self._share.to(adapters[0])
        if places := self.common(adapters):
            own = [self.layout.pick(adapter, places) for adapter in adapters]
            common = share @ torch.stack(own)
            for adapter, mine, step in zip(adapters, own, steps, strict=True):
                way = without_conflict(common - mine, self.layout.pick(step, places))
                self.layout.put(adapter, places, way, alpha=1.0)
        for domain, adapter in enumerate(adapters):
            self.memory.put(SERVER, f"domain-{domain}", self.layout.state(adapter.float()))
        return (share @ torch.stack(adapters)).float()

    def common(self, adapters: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """The tensors of the modules that are among the most important ones of every domain."""
        count = round(self.shared * len(self.layout.pairs))
        chosen = set(range(len(self.layout.pairs)))
        for adapter in adapters:
            parts = self.layout.cut(adapter)
            norms = torch.stack([product_norm(parts[pair.a], parts[pair.b]) for pair in self.layout.pairs])
            chosen &= set(norms.topk(count).indices.tolist())
        pairs = (self.layout.pairs[index] for index in chosen)
        return tuple(sorted(place for pair in pairs for place in (pair.a, pair.b)))


def without_conflict(way: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """`way` without its part against `step`."""
    along = torch.dot(way, step)
    return way - along / step.dot(step) * step if along < 0 else way
