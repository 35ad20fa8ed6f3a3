"""What local training asks of a `transformers.Trainer`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainingArguments


class TrainingHooks(Protocol):
    """The hooks of a `Trainer` by which a client's steps are taken, so that a user's overrides hold there.

    Attributes:
        args: its config, with `local_steps`.
        current_gradient_accumulation_steps: read by `training_step`.
    """

    args: TrainingArguments
    current_gradient_accumulation_steps: int

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """See `Trainer.get_batch_samples`: micro-batches of a step, and what its loss is divided by."""
        ...

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """See `Trainer.training_step`: forward and backward pass of a micro-batch."""
        ...

    def clip_gradients(self, module: nn.Module) -> torch.Tensor | float | None:
        """Clip the gradients of a module's parameters to `max_grad_norm`; returns their norm before."""
        ...

    def leaving_logits_out(self) -> AbstractContextManager:
        """Return a context in which models leave out the logits that the loss does not need."""
        ...
