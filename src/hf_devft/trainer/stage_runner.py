"""Trains a stage's clients in this process, by a trainer's hooks: one after another, or several in a batch."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import set_seed

from hf_devft.federation.batches import CollectedBatches
from hf_devft.federation.clients.batched import CannotStackError, stack_flat, train_together, unstack_flat
from hf_devft.federation.clients.gradient_tap import GradientTap
from hf_devft.federation.clients.hooks import TrainingHooks
from hf_devft.federation.clients.local_training import LocalTraining
from hf_devft.federation.privacy import RecordPrivacy
from hf_devft.federation.sampling import Placement, client_seed
from hf_devft.federation.turns import ClientTurn, LocalResult, Trained, one_after_another
from hf_devft.models.engines import Engine
from hf_devft.models.flops import flops_per_token
from hf_devft.models.layer_stack import returns_tuple, without_layers
from hf_devft.stages.transfer import expand_adapter, fuse_adapter
from hf_devft.trainer.active_stage import ActiveStage, BatchedClients, EarlierSubmodel
from hf_devft.trainer.client_batching import ClientBatching


class StageRunner:
    """Trains a stage's clients as their turns come; `train` is what a round asks for, see `TrainClients`.

    Args:
        stage: whose model they train.
        hooks: the trainer.
        local_training: takes a client's steps.
        batching: whether clients may share a batch.
        placement: this process's share of the work.
        trains: (client) -> the stage whose submodel it trains.
        add_up: sums a tensor over the processes, in place.
        privacy: of the clients' rows, or None.
        using: (engine) -> a context in which its model is the trainer's.
        seed: of the run.
        pad_token: what inputs of several clients are made longer with.
        is_reference: whether the model without its adapter is what the loss compares with.
    """

    def __init__(
        self,
        stage: ActiveStage,
        hooks: TrainingHooks,
        local_training: LocalTraining,
        batching: ClientBatching,
        placement: Placement,
        trains: Callable[[int], int | None],
        add_up: Callable[[torch.Tensor], None],
        privacy: RecordPrivacy | None,
        using: Callable[[Engine], AbstractContextManager],
        seed: int,
        pad_token: int,
        is_reference: bool,
    ):
        self.stage, self.hooks, self.local_training, self.batching = stage, hooks, local_training, batching
        self.placement, self.trains, self.add_up, self.using = placement, trains, add_up, using
        self.privacy, self.seed, self.pad_token, self.is_reference = privacy, seed, pad_token, is_reference
        self._layers_return_tuples: bool | None = None

    def train(self, learning_rate: float, turns: Iterator[ClientTurn]) -> Iterator[tuple[ClientTurn, Trained]]:
        """Train clients as their turns come, as many in one batch as the stage allows."""
        alone = one_after_another(functools.partial(self.train_client, learning_rate))
        while (batched := self.stage.batched) is not None:
            chunk = [self._with_batches(turn) for turn in islice(turns, batched.count)]
            if not chunk:
                return
            trained = self._train_chunk(learning_rate, chunk, batched) if self._are_alike(chunk) else None
            if not isinstance(trained, Exception):
                yield from alone(iter(chunk)) if trained is None else zip(chunk, trained, strict=True)
                continue
            reason, any_failed = self._reason(trained, batched), False
            for turn, one in alone(iter(chunk)):  # shows whose error it was
                any_failed |= isinstance(one, Exception)
                yield turn, one
            if not any_failed:
                self.stage.batched = None
                self.batching.disable(reason)
        yield from alone(turns)

    def train_client(self, learning_rate: float, turn: ClientTurn) -> tuple[LocalResult, torch.Tensor]:
        """Train one client: its result, and its adapter, which the next client's may overwrite."""
        earlier = self.stage.earlier.get(self.trains(turn.client) or 0)
        if earlier is None:
            return self.train_model(learning_rate, turn, self.stage.engine, self.stage.layers)
        return self._train_earlier(learning_rate, turn, earlier)

    def train_model(
        self, learning_rate: float, turn: ClientTurn, engine: Engine, layers: list[nn.Module]
    ) -> tuple[LocalResult, torch.Tensor]:
        """Train a client on a model, whose layers these are."""
        engine.begin_client(turn.start, learning_rate, turn.trains)
        skipping = self._without_layers(engine, layers, turn.skips)  # before the seed: it may run the model once
        whose = (turn.round_index, turn.client)
        seed = client_seed(self.seed, *whose) if self.privacy is None else self.privacy.seed(*whose)
        # Where processes share a batch, each draws its own dropout.
        set_seed(seed + self.placement.index if self.placement.shares_batches else seed)
        private = self.privacy and self.privacy.steps(engine.parameters, *whose)
        with skipping, _tap(engine, turn) as tap:
            result = self.local_training(engine, iter(turn.batches), tap, private)
        per_token = self._flops_per_token(engine, turn, layers)
        result.flops = sum(count * flops for count, flops in zip(result.positions, per_token, strict=True))
        if tap is not None and (gradient := tap.mean_gradient()) is not None:
            if self.placement.shares_batches:  # each has seen the gradient of its share
                self.add_up(gradient)
                gradient /= self.placement.count
            result.mean_gradient = gradient
        return result, engine.read()

    # --- clients that train an earlier stage's submodel -----------------------------------------------------

    def _train_earlier(
        self, learning_rate: float, turn: ClientTurn, earlier: EarlierSubmodel
    ) -> tuple[LocalResult, torch.Tensor]:
        """Train a client that can hold no more than an earlier stage's submodel, from and for this stage's adapter."""
        record, layout, theirs = self.stage.record, self.stage.engine.layout, earlier.engine.layout
        names, groups = self.stage.origin.names, earlier.record.groups or []
        full = self.stage.expand(layout.state(turn.start))
        start = theirs.flat(full.fuse(groups, record.adapter_fusion, record.fusion_beta)).to(turn.start)
        own = replace(turn, start=start, trains=theirs.all)
        with self.using(earlier.engine):
            result, trained = self.train_model(learning_rate, own, earlier.engine, earlier.layers)
        change = theirs.state(trained - start)
        # Each layer of this stage learns what the layers that it stands for have learned, on average.
        change = expand_adapter(change, {}, names, groups)
        change = fuse_adapter(change, names, self.stage.groups, "mean")
        return result, turn.start + layout.flat(change).to(turn.start)

    # --- several clients in one batch -----------------------------------------------------------------------

    def _with_batches(self, turn: ClientTurn) -> ClientTurn:
        """A turn with its batches at hand, so that the next client's can be drawn."""
        set_seed(client_seed(self.seed, turn.round_index, turn.client))  # collators may draw
        return replace(turn, batches=CollectedBatches(turn.batches))

    def _are_alike(self, turns: list[ClientTurn]) -> bool:
        """Whether clients train the same tensors of the stage's model, all of its layers."""
        stage = self.stage.record.stage
        return (
            len(turns) > 1
            and all(self.trains(turn.client) == stage for turn in turns)
            and not any(turn.skips or turn.trains != turns[0].trains for turn in turns)
        )

    def _train_chunk(
        self, learning_rate: float, turns: list[ClientTurn], batched: BatchedClients
    ) -> list[Trained] | Exception:
        """Train clients in one batch; the error of one or of all together, where there is one."""
        layout = self.stage.engine.layout
        (per_token,) = self._flops_per_token(self.stage.engine, turns[0], self.stage.layers)
        try:
            start = stack_flat(layout, [turn.start for turn in turns], batched.count)
            with self.using(batched.engine):
                batched.engine.begin_client(start, learning_rate, turns[0].trains)
                batches = [iter(turn.batches) for turn in turns]
                results = train_together(self.hooks, batched.engine, batched.axis, batches, self.pad_token)
                adapters = unstack_flat(layout, batched.engine.read(), batched.count)
        except Exception as error:
            return error.with_traceback(None)  # which holds on to the step's memory
        for result in results:
            result.flops = result.tokens * per_token
        return list(zip(results, adapters[: len(turns)], strict=True))

    def _reason(self, error: Exception, batched: BatchedClients) -> str:
        """Why clients could not be trained together, by the error; gives the memory back that it took."""
        if isinstance(error, CannotStackError):
            return str(error)
        if not should_reduce_batch_size(error):
            return f"together they fail: {type(error).__name__}: {error}"
        batched.engine.begin_client(batched.engine.read(), batched.engine.learning_rate)
        clear_device_cache(garbage_collection=True)
        return "the memory does not hold their batches together"

    # --- layers that a client leaves out --------------------------------------------------------------------

    def _without_layers(
        self, engine: Engine, layers: list[nn.Module], skipped: tuple[int, ...]
    ) -> AbstractContextManager:
        if not skipped:
            return nullcontext()
        if self._layers_return_tuples is None:
            self._layers_return_tuples = returns_tuple(engine.model, layers)
        return without_layers(layers, skipped, self._layers_return_tuples)

    def _flops_per_token(self, engine: Engine, turn: ClientTurn, layers: list[nn.Module]) -> tuple[float, ...]:
        """FLOPs of training on a position of each stack of layers, as the turn has it."""
        known, kind = engine.flops_per_token, (turn.trains, turn.skips)
        if kind not in known:
            engine.choose(turn.trains)
            skipped = [layers[index] for index in turn.skips]
            known[kind] = flops_per_token(engine.peft_model, skipped, self.is_reference)
        return known[kind]


def _tap(engine: Engine, turn: ClientTurn) -> AbstractContextManager[GradientTap | None]:
    if turn.gradient is None and not turn.records:
        return nullcontext()
    return GradientTap(engine.parameters, engine.layout, engine.read, turn.gradient, turn.records, engine.loss_scale)
