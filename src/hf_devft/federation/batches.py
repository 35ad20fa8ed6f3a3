"""The batches that clients train on: one data loader for a whole run, each client's rows in an order of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_devft.federation.privacy import RecordPrivacy, RowsApart
from hf_devft.federation.sampling import Placement, client_seed
from hf_devft.tasks.data import IGNORED


def client_batches(
    rows: np.ndarray,
    batch_size: int,
    drop_last: bool,
    seed: int,
    lengths: np.ndarray | None = None,
    grouped: int = 1,
) -> Iterator[list[int]]:
    """Endless batches of a client's rows, each pass over them newly shuffled.

    A pass ends with a smaller batch, or without it where `drop_last` (unless it would be the pass's only one).

    Args:
        lengths: of all rows there are. Where they are given, the rows of `grouped` batches are dealt out anew, so that
            rows of like length share one and little is padded; these batches come in a random order. Over all of
            them, the same rows are seen as without lengths.
    """
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(rows))
    while True:
        order = rng.permutation(rows)
        order = order[: len(order) - len(order) % size] if drop_last else order
        if lengths is None:
            yield from _cut(order, size)
            continue
        for some in map(np.array, _cut(order, grouped * size)):
            batches = _cut(some[np.argsort(-lengths[some], kind="stable")], size)
            yield from (batches[index] for index in rng.permutation(len(batches)))


def _cut(rows: np.ndarray, size: int) -> list[list[int]]:
    return [rows[start : start + size].tolist() for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class FederatedBatchSampler:
    """Batches of row indices, client after client.

    Attributes:
        rows: each client's row indices, by its number.
        turns: (round, client) of every local training to come.
        batches_per_client, batch_size, drop_last: see `DevFTConfig`.
        data_seed: orders the rows.
        placement: this process's share of each batch, which may be an empty one.
        lengths: of all rows, where rows of like length share a client's batches of a round; or None.
        privacy: of the rows, for which each is drawn by chance, so that batches have any size; or None.
    """

    rows: Sequence[np.ndarray] | Mapping[int, np.ndarray]
    turns: Iterable[tuple[int, int]]
    batches_per_client: int
    batch_size: int
    drop_last: bool
    data_seed: int
    placement: Placement = field(default_factory=Placement)
    lengths: np.ndarray | None = None
    privacy: RecordPrivacy | None = None

    def __iter__(self) -> Iterator[list[int]]:
        for turn in self.turns:
            batches = self._batches_of(*turn)
            yield from (self.placement.rows(next(batches)) for _ in range(self.batches_per_client))

    def _batches_of(self, round_index: int, client: int) -> Iterator[list[int]]:
        rows = self.rows[client]
        if self.privacy is not None:
            return self.privacy.batches(rows, round_index, client)
        seed = client_seed(self.data_seed, round_index, client)
        return client_batches(rows, self.batch_size, self.drop_last, seed, self.lengths, self.batches_per_client)


@dataclass(frozen=True)
class ShareCollator:
    """A collator for shares of batches: an empty share becomes a row without labels, whose loss and gradient are 0.

    So every process takes part in every forward and backward pass, as DDP and DeepSpeed need it.
    """

    collate: Callable[[list], dict[str, torch.Tensor]]
    stand_in: Any

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        batch = self.collate(rows or [self.stand_in])
        if not rows:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


class ClientBatches:
    """The batches of one client after the other. What a client that failed has left over is passed over.

    Args:
        loader: gives the batches of all clients. batches_per_client: how many of them are each one's.
    """

    def __init__(self, loader: DataLoader, batches_per_client: int):
        self._batches = iter(loader)
        self._per_client = batches_per_client
        self._left = 0

    def next_client(self) -> "ClientBatches":
        """Skip what is left of the client before; returns itself, at the next client's first batch."""
        while self._left:
            try:
                next(self)
            except StopIteration:
                break
            except Exception:  # the failed client's other rows may be as bad
                continue
        self._left = self._per_client
        return self

    def __iter__(self) -> "ClientBatches":
        return self

    def __next__(self) -> Any:
        if not self._left:
            raise StopIteration
        self._left -= 1
        return next(self._batches)


class CollectedBatches:
    """A client's batches, drawn at once; a row that cannot be drawn fails where it would have failed."""

    def __init__(self, batches: Iterable):
        self._batches: list = []
        self._error: Exception | None = None
        try:
            self._batches.extend(batches)
        except Exception as error:
            self._error = error

    def __iter__(self) -> Iterator:
        yield from self._batches
        if self._error is not None:
            raise self._error


def client_loader(
    dataset: Dataset,
    collator: Callable[[list], dict[str, torch.Tensor]],
    sampler: FederatedBatchSampler,
    args: TrainingArguments,
) -> ClientBatches:
    """The batches of local trainings in the sampler's order, from one data loader.

    Args:
        dataset: the clients' rows, in columns that the collator takes.
        args: the `dataloader_*` options and the device.
    """
    collate: Callable[[list], Any] = collator
    if sampler.privacy is not None:
        collate = RowsApart(collator)
    elif sampler.placement.shares_batches:
        collate = ShareCollator(collator, dataset[0])
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
    )
    return ClientBatches(loader, sampler.batches_per_client)
