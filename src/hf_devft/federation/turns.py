"""The seam between a round and whoever trains its clients: a turn goes out, what the client has trained comes back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClientTurn:
    """A client's local training in a round.

    Attributes:
        round_index, client: which.
        start: the adapter that it starts from, flat.
        batches: its data.
        trains: the tensors that it trains, by their places; skips: the layers that it leaves out.
        gradient: (adapter) -> what is added to the gradient there, or None.
        records: whether the mean of its gradients is asked for.
    """

    round_index: int
    client: int
    start: torch.Tensor
    batches: Iterable
    trains: tuple[int, ...]
    skips: tuple[int, ...] = ()
    gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
    records: bool = False


@dataclass
class LocalResult:
    """What local training came to.

    Attributes:
        loss: mean of the optimiser steps' losses, a tensor on the device; NaN where the rows of one had no labels.
        positions: how many went through each stack of the model's layers, padding included.
        padding: how many of the positions in the inputs are padding, by their masks; a number, or a tensor of it.
        seen: how many tokens `include_num_input_tokens_seen` counts.
        grad_norm: of the last step, before clipping; None where gradients are not clipped.
        flops: spent on them.
        mean_gradient: of all steps, before correction and clipping, flat; None where it was not asked for.
    """

    loss: torch.Tensor
    positions: tuple[int, ...]
    padding: torch.Tensor | int
    seen: int
    grad_norm: torch.Tensor | float | None
    flops: float = 0.0
    mean_gradient: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """All positions."""
        return sum(self.positions)


# A client's result and its adapter, which the next one's may overwrite, or the error that it failed with.
Trained = tuple[LocalResult, torch.Tensor] | Exception
# Trains clients as their turns come.
TrainClients = Callable[[Iterator[ClientTurn]], Iterator[tuple[ClientTurn, Trained]]]


def one_after_another(train_client: Callable[[ClientTurn], tuple[LocalResult, torch.Tensor]]) -> TrainClients:
    """Train each client by itself; an error ends its own training alone."""

    def train(turns: Iterator[ClientTurn]) -> Iterator[tuple[ClientTurn, Trained]]:
        for turn in turns:
            trained: Trained
            try:
                trained = train_client(turn)
            except Exception as error:
                trained = error
            yield turn, trained

    return train
