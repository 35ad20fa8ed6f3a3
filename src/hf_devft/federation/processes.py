"""What the processes of a run put together."""

from typing import Any

import torch
from accelerate.utils import gather_object


def add_up(tensor: torch.Tensor) -> None:
    """Sum a tensor over the processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)


def gather(item: Any) -> list:
    """An object of each process, on all of them."""
    return gather_object([item])
