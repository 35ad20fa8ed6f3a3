"""A client's local training, through the Trainer's own hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        positions: those that went through each stack of the model's layers, padding included.
        seen: those that `include_num_input_tokens_seen` counts.
        grad_norm: of the last step, before clipping; None where gradients are not clipped.
        flops: spent on them.
        mean_gradient: of all steps, before correction and clipping, flat; None where it was not asked for.
    """

    loss: torch.Tensor
    positions: tuple[int, ...]
    seen: int
    grad_norm: torch.Tensor | float | None
    flops: float = 0.0
    mean_gradient: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """All positions."""
        return sum(self.positions)


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
        with _in_training(model):
            return self._take_steps(model, batches, tap)

    def _take_steps(self, model: nn.Module, batches: Iterator[Any], tap: GradientTap | None) -> LocalResult:
        args = self.trainer.args
        total = torch.zeros((), device=args.device)
        positions, seen, grad_norm = (), 0, None
        for _ in range(args.local_steps):
            micro_batches, num_items = self.trainer.get_batch_samples(
                batches, args.gradient_accumulation_steps, args.device
            )
            if tap is not None:
                tap.begin_step()
            loss, passed = self._backward_in_pieces(model, micro_batches, num_items, tap)
            total += loss
            positions = tuple(map(sum, zip(positions, passed, strict=True))) if positions else passed
            if args.max_grad_norm > 0:
                grad_norm = self.trainer._clip_grad_norm(self.trainer.engine.adapter)
            self.trainer.optimizer.step()
            self.trainer.engine.zero_grad()
            seen += sum(
                count_seen(self.trainer, model, inputs) for inputs in micro_batches if not self._is_empty(inputs)
            )
        return LocalResult(total / args.local_steps, positions, seen, grad_norm)

    def _is_empty(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether a batch stands in for an empty share."""
        return self.trainer.placement.shares_batches and not inputs["labels"].ne(IGNORED).any()

    def _backward_in_pieces(
        self, model: nn.Module, micro_batches: list, num_items: Any, tap: GradientTap | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
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

    def _backward(
        self, model: nn.Module, pieces: list, num_items: Any, tap: GradientTap | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Gradients of one optimiser step; processes add theirs up in the last piece. Returns its loss, and the
        positions that went through each stack of layers."""
        trainer = self.trainer
        positions = np.zeros(len(trainer.engine.lengths), dtype=int)
        trainer.current_gradient_accumulation_steps = len(pieces)
        losses = []
        for index, inputs in enumerate(pieces):
            last = index == len(pieces) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            if tap is not None:
                tap.corrects = last
            with trainer.engine.gradient_sync(last):
                losses.append(trainer.training_step(model, inputs, num_items))
            if not self._is_empty(inputs):
                positions += len(next(iter(inputs.values()))) * np.array(trainer.engine.lengths)
        return torch.stack(losses).sum(), tuple(positions.tolist())


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in training mode. `training_step` asks for that in every step, which goes
    through all modules, a fortieth of a step of a small model; here only where the mode is another."""
    set_mode, current = model.train, True
    set_mode()

    def train(mode: bool = True) -> nn.Module:
        nonlocal current
        if mode != current:
            set_mode(mode)
            current = mode
        return model

    model.train = train
    try:
        yield
    finally:
        del model.train


def _cut(inputs: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    """A batch's rows in up to `pieces` batches."""
    if pieces == 1:
        return [inputs]
    parts = {name: tensor.chunk(pieces) for name, tensor in inputs.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def count_seen(trainer: Trainer, model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What `include_num_input_tokens_seen` counts of a batch."""
    what = trainer.args.include_num_input_tokens_seen
    if what == "non_padding" and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return 0 if what == "no" else inputs[getattr(model, "main_input_name", "input_ids")].numel()
