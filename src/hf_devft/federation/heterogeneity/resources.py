"""What clients have: speed, bandwidth, times at which they are there. For a simulated clock."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_devft.files import read_json


_TICK = 1e-3  # seconds: times that are closer are the same, whatever rounding has made of them


@dataclass(frozen=True)
class ClientResources:
    """What one client has: speed, bandwidth, and the times at which it is there.

    Attributes:
        flops_per_second: of local training. bytes_per_second: of its connection, each way.
        available: (start, end) of the times at which it is there, in seconds, within each period; default: always.
        period: seconds after which these times repeat, default a day.

    Raises:
        ValueError: speeds of 0 or less, or times outside of the period.
    """

    flops_per_second: float = math.inf
    bytes_per_second: float = math.inf
    available: tuple[tuple[float, float], ...] | None = None
    period: float = 86_400.0

    def __post_init__(self):
        if min(self.flops_per_second, self.bytes_per_second, self.period) <= 0:
            raise ValueError("speeds and the period must be above 0")
        if self.available is not None:
            object.__setattr__(self, "available", _joined(self.available))
            if not all(0 <= start < end <= self.period for start, end in self.available) or not self.available:
                raise ValueError(f"available={self.available} must be times within the period of {self.period} s")

    def seconds(self, flops: float, sent: float) -> float:
        """How long it takes for a round's work."""
        return flops / self.flops_per_second + sent / self.bytes_per_second

    def is_there(self, time: float) -> bool:
        return self.there_from(time) == time

    def there_from(self, time: float) -> float:
        """The first moment from `time` on at which it is there."""
        if self.available is None:
            return time
        begin, within = divmod(time, self.period)
        for start, end in self.available:
            if within < end - _TICK:
                return time if start - _TICK <= within else begin * self.period + start
        return (begin + 1) * self.period + self.available[0][0]

    def stays_until(self, time: float) -> float:
        """When it leaves, being there at `time`."""
        if self.available is None:
            return math.inf
        begin, within = divmod(time, self.period)
        end = next(end for start, end in self.available if start - _TICK <= within < end - _TICK)
        if end == self.period and self.available[0][0] == 0:  # it stays over the period's end
            return (
                math.inf if self.available[0][1] == self.period else (begin + 1) * self.period + self.available[0][1]
            )
        return begin * self.period + end

    def share_there(self, start: float, end: float) -> float:
        """The part of the time from `start` to `end` in which it is there."""
        if self.available is None:
            return 1.0
        total, time = 0.0, start
        while (time := self.there_from(time)) < end:
            leaves = min(self.stays_until(time), end)
            total, time = total + leaves - time, leaves
        return total / (end - start)


def _joined(times: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """The times in order, those that touch or overlap as one."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted((float(a), float(b)) for a, b in times):
        if joined and start <= joined[-1][1] < end:
            joined[-1] = (joined[-1][0], end)
        elif not joined or end > joined[-1][1]:
            joined.append((start, end))
    return tuple(joined)


def make_resources(num_clients: int, seed: int) -> list[ClientResources]:
    """Made-up clients: log-normal speeds around 1 TFLOP/s and 1 MB/s (σ = 1), each there for a fifth to all of a day,
    at a time of its own (our choices, after the spread of real devices that Abdelmoniem et al. 2023, §2.2,
    describe)."""
    rng = np.random.default_rng([seed, num_clients])
    resources, day = [], ClientResources.period
    for _ in range(num_clients):
        start, length = rng.uniform(0, day), rng.uniform(0.2, 1.0) * day
        end = start + length
        times = ((start, end),) if end <= day else ((0.0, end - day), (start, day))
        speeds = np.exp(rng.normal(size=2)) * [1e12, 1e6]
        resources.append(ClientResources(float(speeds[0]), float(speeds[1]), times))
    return resources


def load_resources(path: str | Path, names: Sequence[str]) -> list[ClientResources]:
    """Clients' resources from a JSON file {client: {"flops_per_second": ..., "available": [[start, end], ...], ...}}.

    Raises:
        ValueError: no such file, clients that are missing in it, or fields that `ClientResources` does not take.
    """
    try:
        content = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"client_resources={path} cannot be read: {error}") from error
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"client_resources={path} lacks {len(missing)} clients, such as {missing[0]!r}.")
    try:
        return [ClientResources(**content[name]) for name in names]
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in fields(ClientResources))
        raise ValueError(f"client_resources={path}: {error}. Give {known}.") from error


def expected_flops(
    dataset: Dataset, rows: Sequence[np.ndarray], rows_per_round: int, per_token: tuple[float, ...]
) -> list[float]:
    """What a round asks of each client, by the mean length of its rows.

    Args:
        dataset: with a column `input_ids`. rows: each client's.
        rows_per_round: how many it trains on.
        per_token: FLOPs of one of their tokens in each of the model's stacks of layers.

    Raises:
        ValueError: there is no such column, or more than one stack.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or len(per_token) > 1:
        raise ValueError(
            "client_resources needs rows of `input_ids` (or text), to know how long a round takes, and a model of one "
            "stack of layers: leave it out, and `client_selection`."
        )
    lengths = np.diff(dataset.with_format("arrow")["input_ids"].combine_chunks().offsets.to_numpy())
    return [float(rows_per_round * lengths[own].mean() * per_token[0]) for own in rows]
