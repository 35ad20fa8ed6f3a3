"""What a run cost, round by round: bytes up and down, tokens, FLOPs, seconds, peak memory."""

import ctypes
import gc
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        round, stage: counted from 1.
        clients: names of the sampled clients; dropped: those of them whose update was left out.
        bytes_down, bytes_up: adapters as sent to all sampled clients, and by those that sent one back.
        tokens: positions trained on by them, padding included.
        flops: see `flops_per_token`.
        seconds: wall time of the round, without evaluation and checkpoints.
        peak_memory: bytes, highest within the round on the main process; see `PeakMemory`.
        loss: mean training loss of the clients that were not left out.
        attempts: how often the round was tried; the clients, bytes and tokens are those of all attempts.
        late: names of the sampled clients whose update counts in a later round.
        simulated_seconds: what the round takes by the clients' speeds and bandwidths; 0 where they are not known.
    """

    round: int
    stage: int
    clients: list[str]
    dropped: list[str]
    bytes_down: int
    bytes_up: int
    tokens: int
    flops: float
    seconds: float
    peak_memory: int
    loss: float
    attempts: int = 1
    late: list[str] = field(default_factory=list)
    simulated_seconds: float = 0.0


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

    @classmethod
    def from_dicts(cls, records: list[dict]) -> "Ledger":
        return cls([RoundRecord(**record) for record in records])

    def add(self, record: RoundRecord) -> None:
        """Append a round."""
        self.rounds.append(record)
        self._count(record)

    def _count(self, record: RoundRecord) -> None:
        self.bytes += record.bytes_down + record.bytes_up
        self.flops += record.flops

    def to_dicts(self) -> list[dict]:
        return [asdict(record) for record in self.rounds]

    def totals(self, stage: int | None = None) -> dict[str, float]:
        """Sums over one stage's rounds, or over all; `peak_memory` is the highest."""
        records = [record for record in self.rounds if stage in (None, record.stage)]
        names = ("bytes_down", "bytes_up", "tokens", "flops", "seconds", "simulated_seconds")
        totals = {name: sum(getattr(record, name) for record in records) for name in names}
        return totals | {
            "bytes": totals["bytes_down"] + totals["bytes_up"],
            "peak_memory": max((record.peak_memory for record in records), default=0),
            "dropped_clients": sum(len(record.dropped) for record in records),
        }

    def bytes_until(self, round_number: int) -> int:
        """Bytes sent both ways in the first `round_number` rounds."""
        return sum(record.bytes_down + record.bytes_up for record in self.rounds[:round_number])


def flops_per_token(
    model: torch.nn.Module, skipped: Iterable[torch.nn.Module] = (), encoders: Sequence[torch.nn.Module] = ()
) -> tuple[float, ...]:
    """FLOPs of training on one position of each stack of layers: 4 per frozen and 6 per trainable matrix weight.

    Two for the forward pass and two for the gradient of the input; two more for a weight's own gradient (Kaplan
    et al. 2020, arXiv 2001.08361, §2.1, without the weight gradients that LoRA does not take). Attention scores,
    norms and the embedding's look-up are left out, a tied head is counted.

    Args:
        skipped: modules that the token does not go through.
        encoders: modules with positions of their own.

    Returns:
        Those of each of `encoders`, then those of all other weights.
    """
    out = {id(weight) for module in skipped for weight in module.parameters()}
    flops = []
    embeddings = _embeddings(model)
    if embeddings is not None and not (
        model.get_output_embeddings() is not None and getattr(model.config, "tie_word_embeddings", False)
    ):
        out.add(id(embeddings))
    for module in (*encoders, model):
        weights = [weight for weight in module.parameters() if id(weight) not in out]
        if module is not model:
            weights = [weight for weight in weights if weight is not embeddings]
        out |= set(map(id, weights))
        matrices = [(weight, shape) for weight in weights if len(shape := _shape(weight)) > 1]
        flops.append(float(sum((6 if weight.requires_grad else 4) * shape.numel() for weight, shape in matrices)))
    return tuple(flops)


def forward_flops(model: torch.nn.Module) -> float:
    """FLOPs of one position without gradients: half of what frozen weights take in training."""
    return sum(flops_per_token(model)) / 2


def _embeddings(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The weight of its table of tokens, where it has one."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # audio
        return None


def _shape(weight: torch.Tensor) -> torch.Size:
    state = getattr(weight, "quant_state", None)  # 4-bit weights are packed, those of ZeRO-3 cut
    return getattr(weight, "ds_shape", weight.shape) if state is None else state.shape


class PeakMemory:
    """Peak memory in bytes since `reset`: allocated tensors on a GPU, else the process's resident memory (libraries
    and all)."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (clear := Path("/proc/self/clear_refs")).exists():
            with suppress(OSError):  # not every container may
                clear.write_text("5")  # Linux: forget the peak resident size

    def release(self) -> None:
        """Give freed memory back, so that what an evaluation took does not count as a round's."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            with suppress(OSError, AttributeError):  # a libc other than glibc keeps what it has
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if not status.exists():
            return psutil.Process().memory_info().rss
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
