"""A client's local training, through the Trainer's own hooks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import Trainer

from hf_devft.federation.gradient_tap import GradientTap
from hf_devft.metrics import IGNORED


@dataclass
class LocalResult:
    """What local training came to.

    Attributes:
        loss: mean of the optimiser steps' losses, a tensor on the device.
        tokens: positions that went through the model, padding included.
        seen: those that `include_num_input_tokens_seen` counts.
        grad_norm: of the last step, before clipping; None where gradients are not clipped.
        flops: spent on them.
        mean_gradient: of all steps, before correction and clipping, flat; None where it was not asked for.
    """

    loss: torch.Tensor
    tokens: int
    seen: int
    grad_norm: torch.Tensor | float | None
    flops: float = 0.0
    mean_gradient: torch.Tensor | None = None


class LocalTraining:
    """Takes `local_steps` optimiser steps on a client's batches, as `Trainer`'s own loop takes them.

    Calls the hooks `get_batch_samples`, `training_step` (and so `compute_loss`) and the gradient clipping; callbacks
    are not called, as a step of theirs is a round. With `auto_find_batch_size`, a step that runs out of memory is
    taken again in twice as many pieces, which are accumulated: it is the same step, so that the result does not
    depend on the memory (our choice: `Trainer` starts anew with smaller batches).
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.pieces = 1  # of each micro-batch

    def __call__(self, model: nn.Module, batches: Iterator[Any], tap: GradientTap | None = None) -> LocalResult:
        """Train `model` with `trainer.optimizer`, which must be fresh; `tap` is entered, where gradients are
        tapped."""
        args = self.trainer.args
        total = torch.zeros((), device=args.device)
        tokens, seen, grad_norm = 0, 0, None
        for _ in range(args.local_steps):
            micro_batches, num_items = self.trainer.get_batch_samples(
                batches, args.gradient_accumulation_steps, args.device
            )
            if tap is not None:
                tap.begin_step()
            total += self._backward_in_pieces(model, micro_batches, num_items, tap)
            if args.max_grad_norm > 0:
                grad_norm = self.trainer._clip_grad_norm(self.trainer.engine.adapter)
            self.trainer.optimizer.step()
            self.trainer.engine.zero_grad()
            for inputs in micro_batches:
                if self.trainer.placement.shares_batches and not inputs["labels"].ne(IGNORED).any():
                    continue  # a stand-in for an empty share
                positions, counted = count_tokens(self.trainer, model, inputs)
                tokens += positions
                seen += counted
        return LocalResult(total / args.local_steps, tokens, seen, grad_norm)

    def _backward_in_pieces(
        self, model: nn.Module, micro_batches: list, num_items: Any, tap: GradientTap | None
    ) -> torch.Tensor:
        while True:
            pieces = [piece for inputs in micro_batches for piece in _cut(inputs, self.pieces)]
            try:
                return self._backward(model, pieces, num_items, tap)
            except Exception as error:
                if not (self.trainer.args.auto_find_batch_size and should_reduce_batch_size(error)):
                    raise
                if all(len(next(iter(piece.values()))) == 1 for piece in pieces):
                    raise  # a single row does not fit
            self.trainer.engine.zero_grad()
            clear_device_cache(garbage_collection=True)
            self.pieces *= 2

    def _backward(self, model: nn.Module, pieces: list, num_items: Any, tap: GradientTap | None) -> torch.Tensor:
        """Gradients of one optimiser step; processes add theirs up in the last piece."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(pieces)
        losses = []
        for index, inputs in enumerate(pieces):
            last = index == len(pieces) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            if tap is not None:
                tap.corrects = last
            with trainer.engine.gradient_sync(last):
                losses.append(trainer.training_step(model, inputs, num_items))
        return torch.stack(losses).sum()


def _cut(inputs: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    """A batch's rows in up to `pieces` batches."""
    if pieces == 1:
        return [inputs]
    parts = {name: tensor.chunk(pieces) for name, tensor in inputs.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def count_tokens(trainer: Trainer, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """A batch's positions, and those of them that `include_num_input_tokens_seen` counts."""
    positions = inputs[getattr(model, "main_input_name", "input_ids")].numel()
    what = trainer.args.include_num_input_tokens_seen
    if what == "non_padding" and "attention_mask" in inputs:
        return positions, int(inputs["attention_mask"].sum())
    return positions, 0 if what == "no" else positions
