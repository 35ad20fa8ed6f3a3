"""What a run cost, round by round: bytes up and down, tokens, FLOPs, seconds, peak memory."""

import ctypes
import gc
import sys
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
        bytes_down, bytes_up: adapters as sent to and by all sampled clients.
        tokens: positions trained on by all sampled clients, padding included.
        flops: see `training_flops`.
        seconds: wall time of the round, without evaluation and checkpoints.
        peak_memory: bytes, highest within the round; see `PeakMemory`.
        loss: mean training loss of the clients that were not left out.
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


@dataclass
class Ledger:
    """The records of all rounds so far."""

    rounds: list[RoundRecord] = field(default_factory=list)

    @classmethod
    def from_dicts(cls, records: list[dict]) -> "Ledger":
        return cls([RoundRecord(**record) for record in records])

    def to_dicts(self) -> list[dict]:
        return [asdict(record) for record in self.rounds]

    def totals(self, stage: int | None = None) -> dict[str, float]:
        """Sums over one stage's rounds, or over all; `peak_memory` is the highest."""
        records = [record for record in self.rounds if stage in (None, record.stage)]
        names = ("bytes_down", "bytes_up", "tokens", "flops", "seconds")
        totals = {name: sum(getattr(record, name) for record in records) for name in names}
        return totals | {
            "bytes": totals["bytes_down"] + totals["bytes_up"],
            "peak_memory": max((record.peak_memory for record in records), default=0),
            "dropped_clients": sum(len(record.dropped) for record in records),
        }

    def bytes_until(self, round_number: int) -> int:
        """Bytes sent both ways in the first `round_number` rounds."""
        return sum(record.bytes_down + record.bytes_up for record in self.rounds[:round_number])


def training_flops(tokens: int, model: torch.nn.Module) -> float:
    """FLOPs of training on `tokens` positions: 4 per frozen and 6 per trainable matrix weight and position.

    Two for the forward pass and two for the gradient of the input; two more for a weight's own gradient (Kaplan
    et al. 2020, arXiv 2001.08361, §2.1, without the weight gradients that LoRA does not take). Attention scores,
    norms and the embedding's look-up are left out, a tied head is counted.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    lookup = None if tied else model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and weight is not lookup]
    trainable = sum(weight.numel() for weight in matrices if weight.requires_grad)
    frozen = sum(_numel(weight) for weight in matrices if not weight.requires_grad)
    return float(tokens) * (4 * frozen + 6 * trainable)


def _numel(weight: torch.Tensor) -> int:
    state = getattr(weight, "quant_state", None)  # 4-bit weights are packed
    return weight.numel() if state is None else state.shape.numel()


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
