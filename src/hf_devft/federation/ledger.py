"""What a run cost, round by round: bytes up and down, tokens, FLOPs, seconds, peak memory."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import AllowInfNan


Count = Annotated[int, Ge(0)]
Amount = Annotated[float, Ge(0), AllowInfNan(False)]


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        round, stage: counted from 1.
        clients: names of the sampled clients; dropped: those of them whose update was left out.
        bytes_down, bytes_up: adapters as sent to all sampled clients, and by those that sent one back.
        tokens: positions trained on by them, padding included.
        padding: how many of the inputs' positions that is, by their masks; over a network 0, as clients do not say it.
        flops: see `flops_per_token`.
        seconds: wall time of the round, without evaluation and checkpoints.
        peak_memory: bytes, highest within the round on the main process; see `PeakMemory`.
        loss: mean training loss of the clients that were not left out; None in a private run, which also names no
            client.
        attempts: how often the round was tried; the clients, bytes and tokens are those of all attempts.
        late: names of the sampled clients whose update counts in a later round.
        simulated_seconds: what the round takes by the clients' speeds and bandwidths; 0 where they are not known.
        epsilon: what the rounds so far have cost in privacy, see `Accountant`; None in a run that is not private.
        drawn_from: of how many clients chance has drawn the round's, where it is this that makes them private.
    """

    round: Annotated[int, Ge(1)]
    stage: Annotated[int, Ge(1)]
    clients: list[str]
    dropped: list[str]
    bytes_down: Count
    bytes_up: Count
    tokens: Count
    flops: Amount
    seconds: Amount
    peak_memory: Count
    loss: float | None
    attempts: Annotated[int, Ge(1)] = 1
    late: list[str] = field(default_factory=list)
    simulated_seconds: Amount = 0.0
    epsilon: Amount | None = None
    padding: Count = 0
    drawn_from: Count | None = None


@dataclass
class Ledger:
    """The records of all rounds so far.

    Attributes:
        rounds: one record each.
        bytes: sent both ways so far; flops: spent so far.
    """

    rounds: list[RoundRecord] = field(default_factory=list)
    bytes: int = field(default=0, init=False)
    flops: float = field(default=0.0, init=False)

    def __post_init__(self):
        for record in self.rounds:
            self._count(record)

    def add(self, record: RoundRecord) -> None:
        """Append a round."""
        self.rounds.append(record)
        self._count(record)

    def _count(self, record: RoundRecord) -> None:
        self.bytes += record.bytes_down + record.bytes_up
        self.flops += record.flops

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.rounds]

    def totals(self, stage: int | None = None) -> dict[str, float]:
        """Sums over one stage's rounds, or over all; `peak_memory` is the highest, and so is `epsilon` of a
        private run."""
        records = [record for record in self.rounds if stage in (None, record.stage)]
        names = ("bytes_down", "bytes_up", "tokens", "padding", "flops", "seconds", "simulated_seconds")
        totals = {name: sum(getattr(record, name) for record in records) for name in names}
        spent = [record.epsilon for record in records if record.epsilon is not None]
        privacy = {"epsilon": max(spent)} if spent else {}
        return (
            totals
            | privacy
            | {
                "bytes": totals["bytes_down"] + totals["bytes_up"],
                "peak_memory": max((record.peak_memory for record in records), default=0),
                "dropped_clients": sum(len(record.dropped) for record in records),
            }
        )

    def bytes_until(self, round_number: int) -> int:
        """Bytes sent both ways in the first `round_number` rounds."""
        return sum(record.bytes_down + record.bytes_up for record in self.rounds[:round_number])
