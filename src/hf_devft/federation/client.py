"""A client: its adapter as one flat vector, and its local training through the Trainer's own hooks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class AdapterBuffer:
    """All trainable parameters of a model as views of one flat vector, so that entering a client is one copy.

    Attributes:
        flat: the vector; writing to it writes the parameters.
    """

    def __init__(self, model: nn.Module):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        offset = 0
        for parameter in parameters:
            parameter.data = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()


@dataclass
class LocalResult:
    """What local training came to.

    Attributes:
        loss: mean of the optimiser steps' losses, a tensor on the device.
        tokens: positions that went through the model, padding included.
        grad_norm: of the last step, before clipping; None where gradients are not clipped.
    """

    loss: torch.Tensor
    tokens: int
    grad_norm: torch.Tensor | None


def train_locally(trainer: Trainer, model: nn.Module, batches: Iterator[Any], local_steps: int) -> LocalResult:
    """`local_steps` optimiser steps on the client's batches, as `Trainer`'s own loop takes them.

    `trainer.optimizer` must be fresh. Calls the hooks `get_batch_samples`, `training_step` (and so `compute_loss`)
    and the gradient clipping; callbacks are not called, as a step of theirs is a round.
    """
    accumulation = trainer.args.gradient_accumulation_steps
    total = torch.zeros((), device=trainer.args.device)
    tokens, grad_norm = 0, None
    for _ in range(local_steps):
        micro_batches, num_items = trainer.get_batch_samples(batches, accumulation, trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        for index, inputs in enumerate(micro_batches):
            trainer.accelerator.gradient_state._set_sync_gradients(index == len(micro_batches) - 1)
            tokens += inputs[getattr(model, "main_input_name", "input_ids")].numel()
            trainer._track_num_input_tokens(inputs)
            total += trainer.training_step(model, inputs, num_items)
        if trainer.args.max_grad_norm > 0:
            grad_norm = trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        model.zero_grad()
    return LocalResult(total / local_steps, tokens, grad_norm)
