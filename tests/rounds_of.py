"""Rounds of a method without any model, for its tests."""

from collections.abc import Callable, Sequence

import torch

from hf_devft.federation.methods import Clients, FederatedMethod
from hf_devft.models.layout import AdapterLayout


def layout(modules: int = 2, out: int = 5, rank: int = 4, into: int = 6, scaling: float = 2.0) -> AdapterLayout:
    """A LoRA module of `out` x `into` in each of some layers."""
    names = [f"base_model.model.model.layers.{layer}.mlp.up_proj" for layer in range(modules)]
    keys = [f"{name}.lora_{factor}.weight" for name in names for factor in "AB"]
    shapes = [torch.Size(shape) for _ in names for shape in ((rank, into), (out, rank))]
    return AdapterLayout(tuple(keys), tuple(shapes), scaling)


def random_adapter(of: AdapterLayout, seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(of.sizes), generator=torch.Generator().manual_seed(seed))


def begin(method: FederatedMethod, of: AdapterLayout, examples: Sequence[int], start: torch.Tensor) -> Clients:
    counts = torch.randint(0, 9, (len(examples), 30), generator=torch.Generator().manual_seed(7)).double().numpy()
    clients = Clients(examples=list(examples), label_counts=lambda: counts)
    method.begin_run(clients)
    method.begin_stage(of, start)
    return clients


def round_of(
    method: FederatedMethod,
    index: int,
    adapter: torch.Tensor,
    sampled: Sequence[int],
    train: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One round on one process; `train` is (client, start) -> the adapter that it returns."""
    method.begin_round(index, adapter, sampled)
    for client in sampled:
        start = method.start(client, method.download(client))
        trained = start.clone()
        method.layout.put(
            trained, method.trains(client), method.layout.pick(train(client, start), method.trains(client))
        )
        method.keep(client, start, trained)
        method.receive(client, start, method.payload(client, trained))
    new = method.end_round()
    method.memory.commit()
    return new


def products(of: AdapterLayout, adapter: torch.Tensor) -> list[torch.Tensor]:
    """scaling · BA of every module."""
    parts = of.cut(adapter)
    return [of.scaling * parts[pair.b] @ parts[pair.a] for pair in of.pairs]


def mean_products(of: AdapterLayout, adapters: Sequence[torch.Tensor], weights: Sequence[float]) -> list[torch.Tensor]:
    """Σ p_k scaling · B_k A_k of every module."""
    total = sum(weights)
    each = [products(of, adapter.double()) for adapter in adapters]
    return [sum(w / total * p[i] for w, p in zip(weights, each, strict=True)) for i in range(len(of.pairs))]
