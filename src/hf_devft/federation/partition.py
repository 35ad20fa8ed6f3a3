"""A dataset -> clients: one dataset in client order, and each client's rows in it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets


DEFAULT_NUM_CLIENTS = 20  # paper, §4.1


@dataclass(frozen=True)
class ClientData:
    """The rows of all clients.

    Attributes:
        dataset: every client's rows.
        rows: {client's name: indices into `dataset`}, none empty, none shared.
        elsewhere: how many examples each client has, where they have their rows themselves, by number; 0 for one that
            has not said it yet. `dataset` and `rows` are empty then.
        partition: how the rows came to the clients: a name in `PARTITIONS`, a partitioner's, or as they are.
    """

    dataset: Dataset
    rows: dict[str, np.ndarray]
    elsewhere: list[int] | None = None
    partition: str = "each client's own data"

    def __post_init__(self):
        if not self.rows:
            raise ValueError("there is no client: pass a dataset, or {client: dataset} with at least one client.")
        if self.elsewhere is not None:
            return
        if empty := [name for name, rows in self.rows.items() if len(rows) == 0]:
            raise ValueError(
                f"{len(empty)} of {len(self.rows)} clients have no rows ({', '.join(empty[:5])}): leave them out, or "
                "use fewer clients or more data."
            )

    @cached_property
    def names(self) -> list[str]:
        """The clients' names, by number."""
        return list(self.rows)

    @property
    def examples(self) -> list[int]:
        """How many examples each client has, by number."""
        return [len(rows) for rows in self.rows.values()] if self.elsewhere is None else self.elsewhere

    def digest(self) -> str:
        """Return a SHA-256 of who has which rows."""
        found = hashlib.sha256()
        for name, rows in self.rows.items():
            found.update(f"{name}:{len(rows)}:".encode() + rows.tobytes())
        return found.hexdigest()


def clients_elsewhere(names: Sequence[str]) -> ClientData:
    """Make clients that have their rows themselves, and have not said yet how many."""
    nothing = Dataset.from_dict({"input_ids": [], "labels": []})
    return ClientData(nothing, {name: np.arange(0) for name in names}, [0] * len(names))


def from_mapping(clients: Mapping[str, Dataset]) -> ClientData:
    """Make clients of what is given: {name: dataset}."""
    if not clients:
        return ClientData(Dataset.from_dict({}), {})
    ends = np.cumsum([len(dataset) for dataset in clients.values()])
    starts = [0, *ends[:-1]]
    rows = {str(name): np.arange(*span) for name, span in zip(clients, zip(starts, ends, strict=True), strict=True)}
    return ClientData(concatenate_datasets([dataset for dataset in clients.values() if len(dataset)]), rows)


def from_partitioner(partitioner: Any, dataset: Dataset) -> ClientData:
    """Make clients by any object with flwr-datasets' `Partitioner` interface: dataset, num_partitions,
    load_partition."""
    partitioner.dataset = dataset
    count = partitioner.num_partitions
    clients = from_mapping({f"client-{index}": partitioner.load_partition(index) for index in range(count)})
    return replace(clients, partition=type(partitioner).__name__)


def hold_out(clients: ClientData, part: float, seed: int = 0) -> tuple[ClientData, dict[str, Dataset]]:
    """Keep a part of each client's rows for evaluation, drawn by the seed: at least one, and one is left to train on.

    Returns:
        The clients with the other rows, and {client: rows held out}.

    Raises:
        ValueError: a client with a single row.
    """
    if single := [name for name, rows in clients.rows.items() if len(rows) < 2]:
        raise ValueError(
            f"client_eval_size={part} holds rows of each client out, but {', '.join(single[:5])} have one: leave them "
            "out, or pass `eval_dataset` instead."
        )
    kept, held = {}, {}
    for number, (name, rows) in enumerate(clients.rows.items()):
        shuffled = np.random.default_rng([seed, number, 1]).permutation(rows)
        count = min(max(1, round(part * len(rows))), len(rows) - 1)
        kept[name], held[name] = np.sort(shuffled[count:]), clients.dataset.select(np.sort(shuffled[:count]))
    return replace(clients, rows=kept), held


_SPLITS = {"train", "validation", "test"}  # of a `DatasetDict`, as `load_dataset` makes it


def make_clients(data: Any, partitioner: Any = None, num_clients: int | None = None, **options) -> ClientData:
    """Make clients from whatever a user has: {client: dataset}, a dataset and a partitioner, or a dataset and options.

    Args:
        data: a dataset, {client: dataset}, or `ClientData`.
        partitioner: see `from_partitioner`.
        num_clients, options: see `partition_dataset`.

    Raises:
        ValueError: none of these, splits in place of clients, or a count that contradicts the clients given.
    """
    if isinstance(data, ClientData):
        return data
    if isinstance(data, Mapping) and data and set(data) <= _SPLITS:
        raise ValueError(
            f"train_dataset has the splits {', '.join(data)}, which would be clients: pass one of them, such as "
            "data['train'], or name the clients otherwise."
        )
    if isinstance(data, Mapping) and num_clients not in (None, len(data)):
        raise ValueError(f"num_clients={num_clients}, but train_dataset has {len(data)} clients: leave it out.")
    if isinstance(data, Mapping) and partitioner is not None:
        raise ValueError("train_dataset says whose rows are whose: leave `partitioner` out, or pass one dataset.")
    if isinstance(data, Mapping):
        return from_mapping(data)
    if not isinstance(data, Dataset):
        raise ValueError(
            f"train_dataset is a {type(data).__name__}: pass a `datasets.Dataset` (`Dataset.from_list` makes one; a "
            "streaming one cannot be partitioned), or {client: Dataset}."
        )
    if not len(data):
        raise ValueError("train_dataset has no rows: give one or more for each client.")
    if partitioner is not None:
        clients = from_partitioner(partitioner, data)
        if num_clients not in (None, len(clients.rows)):
            raise ValueError(
                f"num_clients={num_clients}, but the partitioner makes {len(clients.rows)} clients: leave it out."
            )
        return clients
    return partition_dataset(data, num_clients=num_clients, **options)


def partition_dataset(
    dataset: Dataset,
    kind: str = "iid",
    num_clients: int | None = None,
    column: str | None = None,
    alpha: float = 0.5,
    seed: int = 0,
) -> ClientData:
    """Cut one dataset into clients.

    Args:
        dataset: rows of all clients.
        kind: a name in `PARTITIONS`.
        num_clients: number of clients; default 20, or the number of values for "natural".
        column: the column for "dirichlet" and "natural".
        alpha: concentration; small is far from IID.
        seed: same seed, same clients.

    Raises:
        ValueError: an unknown column, more clients than rows, or a count that a natural partition does not have.
    """
    if kind != "iid" and column not in dataset.column_names:
        raise ValueError(
            f"partition_column={column!r} is not in the dataset: give one of {', '.join(dataset.column_names)}, or "
            'partition="iid".'
        )
    if kind != "iid":
        _refuse_missing(dataset, str(column))
    rows = PARTITIONS[kind](dataset, num_clients, column, alpha, np.random.default_rng(seed))
    return ClientData(dataset, {name: np.sort(own) for name, own in rows.items()}, partition=kind)


def _refuse_missing(dataset: Dataset, column: str) -> None:
    """Refuse a column in which some rows do not say whose they are."""
    for row, value in enumerate(dataset[column][:]):
        if value is None or value != value:  # NaN
            raise ValueError(
                f"partition_column={column!r}: row {row} has no value there: fill it in, or leave such rows out."
            )


Rows = dict[str, np.ndarray]


def _iid(
    dataset: Dataset, num_clients: int | None, column: str | None, alpha: float, rng: np.random.Generator
) -> Rows:
    """Shuffle the rows and cut them into equal parts."""
    count = _count(dataset, num_clients)
    return _numbered(np.array_split(rng.permutation(len(dataset)), count))


def _dirichlet(
    dataset: Dataset, num_clients: int | None, column: str | None, alpha: float, rng: np.random.Generator
) -> Rows:
    """Spread each value of `column` over the clients by a draw from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv
    1905.12022, §4), so that clients differ in how many rows they have, too. A client that drew none takes a row from
    the largest, so that every client can be sampled."""
    count, values = _count(dataset, num_clients), np.asarray(dataset[column][:])
    parts: list[list[int]] = [[] for _ in range(count)]
    for value in np.unique(values):
        rows = rng.permutation(np.flatnonzero(values == value))
        ends = np.cumsum(rng.dirichlet([alpha] * count))[:-1] * len(rows)
        # Rounded down, the last row of a value is always the last client's: where there are few, chance rounds.
        cuts = (ends + (rng.random() if len(rows) < count else 0.0)).astype(int)
        for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(chunk.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return _numbered([np.array(part) for part in parts])


def _natural(
    dataset: Dataset, num_clients: int | None, column: str | None, alpha: float, rng: np.random.Generator
) -> Rows:
    """Make one client for each value of `column`."""
    values, owners = np.unique(np.asarray(dataset[column][:]).astype(str), return_inverse=True)
    if num_clients not in (None, len(values)):
        raise ValueError(
            f"num_clients={num_clients}, but column {column!r} has {len(values)} values, one client each: leave "
            "num_clients out."
        )
    return {value: np.flatnonzero(owners == index) for index, value in enumerate(values)}


def _count(dataset: Dataset, num_clients: int | None) -> int:
    count = DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
    if count > len(dataset):
        raise ValueError(
            f"num_clients={count} is more than the {len(dataset)} rows to deal out: set it to {len(dataset)} or less."
        )
    return count


def _numbered(parts: Sequence[np.ndarray]) -> Rows:
    return {f"client-{index}": part for index, part in enumerate(parts)}


# Name -> how one dataset is cut: (dataset, num_clients, column, alpha, rng) -> {client: its rows}.
PARTITIONS: dict[str, Callable[[Dataset, int | None, str | None, float, np.random.Generator], Rows]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "natural": _natural,
}
