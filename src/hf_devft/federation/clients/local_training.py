"""A client's local training, through the Trainer's own hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from hf_devft.federation.clients.gradient_tap import GradientTap
from hf_devft.federation.clients.hooks import TrainingHooks
from hf_devft.federation.privacy import PrivateSteps
from hf_devft.federation.turns import LocalResult
from hf_devft.models.engines import Engine
from hf_devft.tasks.data import IGNORED


class LocalTraining:
    """Takes `local_steps` optimiser steps on a client's batches, as `Trainer`'s own loop takes them.

    Callbacks are not called, as a step of theirs is a round. With `auto_find_batch_size`, a step that runs out of
    memory is taken again in twice as many pieces, which are accumulated: it is the same step, so that the result does
    not depend on the memory (our choice: `Trainer` starts anew with smaller batches).

    Args:
        hooks: the trainer.
        shares_batches: whether several processes train a client together, each on its share of every batch.

    Attributes:
        pieces: of each micro-batch, so far.
    """

    def __init__(self, hooks: TrainingHooks, shares_batches: bool):
        self.hooks, self.shares_batches = hooks, shares_batches
        self.pieces = 1

    def __call__(
        self,
        engine: Engine,
        batches: Iterator[Any],
        tap: GradientTap | None = None,
        private: PrivateSteps | None = None,
    ) -> LocalResult:
        """Train `engine`'s adapter with its optimiser, which must be fresh.

        Args:
            tap: entered, where gradients are tapped.
            private: where steps are private for each row; `batches` are then of rows apart, see `RowsApart`.
        """
        with _in_training(engine.model), self.hooks.leaving_logits_out():
            if private is not None:
                return self._take_private_steps(engine, batches, private)
            return self._take_steps(engine, batches, tap)

    def _take_private_steps(self, engine: Engine, batches: Iterator[Any], private: PrivateSteps) -> LocalResult:
        """Steps in which each row goes through the model alone. They report no loss, which no noise covers."""
        hooks, args, grad_norm = self.hooks, self.hooks.args, None
        for _ in range(args.local_steps):
            engine.zero_grad()
            for row in next(batches):
                inputs, num_items, _ = next_step(hooks, iter([row]), 1)
                self._backward(engine, inputs, num_items, None)
                private.add_row()
            private.end_step()
            if args.max_grad_norm > 0:
                grad_norm = hooks.clip_gradients(engine.adapter)
            engine.optimizer.step()
            engine.zero_grad()
        return LocalResult(torch.tensor(float("nan"), device=args.device), (0,) * len(engine.lengths), 0, 0, grad_norm)

    def _take_steps(self, engine: Engine, batches: Iterator[Any], tap: GradientTap | None) -> LocalResult:
        hooks, args = self.hooks, self.hooks.args
        total = torch.zeros((), device=args.device)
        positions: tuple[int, ...] = ()
        padding: torch.Tensor | int = 0
        seen, grad_norm = 0, None
        for _ in range(args.local_steps):
            micro_batches, num_items, unknown = next_step(hooks, batches, args.gradient_accumulation_steps)
            if tap is not None:
                tap.begin_step()
            loss, passed = self._backward_in_pieces(engine, micro_batches, num_items, tap)
            total += loss + unknown
            positions = tuple(map(sum, zip(positions, passed, strict=True))) if positions else passed
            if args.max_grad_norm > 0:
                grad_norm = hooks.clip_gradients(engine.adapter)
            engine.optimizer.step()
            engine.zero_grad()
            for inputs in micro_batches:
                if not self._is_empty(inputs):
                    padding = padding + count_padding(inputs)
                    seen += count_seen(args.include_num_input_tokens_seen, engine.model, inputs)
        return LocalResult(total / args.local_steps, positions, padding, seen, grad_norm)

    def _is_empty(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether a batch stands in for an empty share."""
        return self.shares_batches and not bool(inputs["labels"].ne(IGNORED).any())

    def _backward_in_pieces(
        self, engine: Engine, micro_batches: list, num_items: Any, tap: GradientTap | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """`_backward` of a step, in as many pieces as the memory asks for."""
        while True:
            pieces = [piece for inputs in micro_batches for piece in _cut(inputs, self.pieces)]
            try:
                return self._backward(engine, pieces, num_items, tap)
            except Exception as error:
                if not (self.hooks.args.auto_find_batch_size and should_reduce_batch_size(error)):
                    raise
                if all(len(next(iter(piece.values()))) == 1 for piece in pieces):
                    raise  # a single row does not fit
            engine.zero_grad()
            clear_device_cache(garbage_collection=True)
            self.pieces *= 2

    def _backward(
        self, engine: Engine, pieces: list, num_items: Any, tap: GradientTap | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Gradients of one optimiser step; processes add theirs up in the last piece. Returns its loss, and the
        positions that went through each stack of layers."""
        positions = np.zeros(len(engine.lengths), dtype=int)
        self.hooks.current_gradient_accumulation_steps = len(pieces)
        losses = []
        for index, inputs in enumerate(pieces):
            last = index == len(pieces) - 1
            if tap is not None:
                tap.corrects = last
            with engine.gradient_sync(last):
                losses.append(self.hooks.training_step(engine.model, inputs, num_items))
            if not self._is_empty(inputs):
                positions += len(next(iter(inputs.values()))) * np.array(engine.lengths)
        return torch.stack(losses).sum(), tuple(positions.tolist())


def next_step(hooks: TrainingHooks, batches: Iterator[Any], count: int) -> tuple[list, Any, torch.Tensor | float]:
    """Draw the micro-batches of a step.

    Returns:
        They; what the loss is divided by, which is never 0, so that a step whose rows have no labels learns nothing;
        and what is added to the loss that is reported: NaN for such a step, whose loss nobody knows, else 0.
    """
    micro_batches, num_items = hooks.get_batch_samples(batches, count, hooks.args.device)
    if num_items is None:  # the model's own mean
        return micro_batches, None, 0.0
    num_items = torch.as_tensor(num_items, device=hooks.args.device)
    unknown = torch.where(num_items > 0, 0.0, float("nan"))
    return micro_batches, num_items.clamp(min=1), unknown


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in training mode, and being asked for the mode that it is in costs nothing
    (`training_step` asks in every step, which goes through all modules: a fortieth of a step of a small model)."""
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


def count_padding(inputs: dict[str, torch.Tensor]) -> torch.Tensor | int:
    """How many positions of a batch are padding, on its device; 0 where it has no mask."""
    return inputs["attention_mask"].eq(0).sum() if "attention_mask" in inputs else 0


def count_seen(what: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What `include_num_input_tokens_seen` counts of a batch, "no", "all" or "non_padding"."""
    if what == "non_padding" and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return 0 if what == "no" else inputs[getattr(model, "main_input_name", "input_ids")].numel()
