"""The highest memory that a piece of work has taken, and what is free for one."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


# Part of the free memory that training may take (our choice: rows may be longer still, and others live here, too).
USABLE = 0.9


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process could have in all: what it has, and what is free. On a CPU, the processes of one
    launch share what is free, and what they have of files counts as free, as the system may drop it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    sharing, own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), psutil.Process().memory_info()
    return psutil.virtual_memory().available // sharing + own.rss - getattr(own, "shared", 0)


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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            with suppress(OSError, AttributeError):  # a libc other than glibc keeps what it has
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if not status.exists():  # not Linux: of the whole process so far, or what it holds now
            return _highest() or psutil.Process().memory_info().rss
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024


def _highest() -> int:
    """Bytes that this process has held at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
