"""`LocalTrainingMixin`: a round's clients, one after another or several in one batch, on the stage's model."""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch import nn
from transformers import set_seed

from hf_devft.federation.batches import CollectedBatches
from hf_devft.federation.client import LocalResult
from hf_devft.federation.client_axis import CannotStackError, obstacle, stack_flat, train_together, unstack_flat
from hf_devft.federation.gradient_tap import GradientTap
from hf_devft.federation.ledger import flops_per_token
from hf_devft.federation.rounds import ClientTurn, Trained, one_after_another
from hf_devft.federation.sampling import client_seed
from hf_devft.stages.layer_stack import encoders_of, returns_tuple, without_layers
from hf_devft.stages.transfer import expand_adapter, fuse_adapter


logger = logging.getLogger(__name__)


class LocalTrainingMixin:
    """Takes clients' turns with the running stage's model, or with what stands for it."""

    def _clients_in_a_batch(self, model: PeftModel) -> int:
        """How many clients of a round train in one batch, at most; says why, where it is fewer than was asked for."""
        most = len(self.placement.clients(range(self.args.clients_per_round)))
        asked = self.args.clients_per_batch or (most if self.args.device.type != "cpu" else 1)
        if self._apart or min(asked, most) == 1:
            return 1
        reason, federation = obstacle(self, model), self._federation
        if federation.method.corrects or federation.correction is not None:
            reason = f"federated_method={self.args.federated_method!r} looks at each client's gradients"
        if reason is None:
            return min(asked, most)
        self._train_apart(reason)
        return 1

    def _train_apart(self, reason: str) -> None:
        """One client after another from here on; says why, as a warning where something else was asked for."""
        self._apart = True
        if self._running is not None:
            self._running.together = None
        if self.is_world_process_zero():
            asked = self.args.clients_per_batch
            level = logging.INFO if asked is None else logging.WARNING
            logger.log(level, f"clients_per_batch={asked}: clients are trained one after another, as {reason}.")

    def _train_clients(
        self, learning_rate: float, turns: Iterator[ClientTurn]
    ) -> Iterator[tuple[ClientTurn, Trained]]:
        """Clients as their turns come, `clients_per_batch` of them at a time."""
        alone = one_after_another(functools.partial(self._train_client, learning_rate))
        while self._running.together is not None:
            chunk = [self._collected(turn) for turn in islice(turns, self._running.together.count)]
            if not chunk:
                return
            trained = self._train_chunk(learning_rate, chunk) if self._is_alike(chunk) else None
            if not isinstance(trained, Exception):
                yield from alone(iter(chunk)) if trained is None else zip(chunk, trained, strict=True)
                continue
            reason, failed = self._reason(trained), False
            for turn, each in alone(iter(chunk)):  # shows whose error it was
                failed |= isinstance(each, Exception)
                yield turn, each
            if not failed:
                self._train_apart(reason)
        yield from alone(turns)

    def _is_alike(self, turns: list[ClientTurn]) -> bool:
        """Whether these clients train the same tensors of the running stage's model, all of its layers."""
        plain = all(self._held_by(turn.client, self._running.stage) is self._running.stage for turn in turns)
        return plain and len(turns) > 1 and not any(t.skips or t.trains != turns[0].trains for t in turns)

    def _reason(self, error: Exception) -> str:
        """Why clients could not be trained together, by the error; the memory that it took is given back."""
        if isinstance(error, CannotStackError):
            return str(error)
        if not should_reduce_batch_size(error):
            return f"together they fail: {type(error).__name__}: {error}"
        self._running.together.engine.begin_client(self._running.together.engine.read(), self.args.learning_rate)
        clear_device_cache(garbage_collection=True)
        return "the memory does not hold their batches together"

    def _collected(self, turn: ClientTurn) -> ClientTurn:
        """With its batches at hand, so that the next client's can be drawn."""
        set_seed(client_seed(self.args.seed, self.state.global_step, turn.client))  # collators may draw
        return replace(turn, batches=CollectedBatches(turn.batches))

    def _train_chunk(self, learning_rate: float, turns: list[ClientTurn]) -> list[Trained] | Exception:
        """Clients in one batch, or the error of one or of all together."""
        together, count = self._running.together, len(turns)
        layout, (per_token,) = self.engine.layout, self._flops_per_token(turns[0], self._running.layers)
        try:
            start = stack_flat(layout, [turn.start for turn in turns], together.count)
            with self._switched_to(together.model, together.engine):
                self.engine.begin_client(start, learning_rate, turns[0].trains)
                batches = [iter(turn.batches) for turn in turns]
                results = train_together(self, self.model_wrapped, together.axis, batches)
                adapters = unstack_flat(layout, self.engine.read(), together.count)
        except Exception as error:
            return error.with_traceback(None)  # which holds on to the step's memory
        for result in results:
            result.flops = result.tokens * per_token
        return list(zip(results, adapters[:count], strict=True))

    def _train_client(self, learning_rate: float, turn: ClientTurn) -> tuple[LocalResult, torch.Tensor]:
        """A client's local training: its result, and the adapter, which the next client's may overwrite."""
        running = self._running
        smaller = running.smaller.get(self._held_by(turn.client, running.stage).stage)
        if smaller is None:
            return self._train_submodel(learning_rate, turn, running.layers)
        layout, names = self.engine.layout, running.stack.names
        full = self._expanded(layout.state(turn.start))
        rules = (running.stage.adapter_fusion, running.stage.fusion_beta)
        start = smaller.engine.layout.flat(fuse_adapter(full, names, smaller.stage.groups, *rules)).to(turn.start)
        own = replace(turn, start=start, trains=smaller.engine.layout.all)
        with self._switched_to(smaller.model, smaller.engine):
            result, trained = self._train_submodel(learning_rate, own, smaller.layers)
        change = smaller.engine.layout.state(trained - start)
        # Each layer of the running stage learns what the layers that it stands for have learned, on average.
        change = expand_adapter(change, {}, names, smaller.stage.groups)
        change = layout.flat(fuse_adapter(change, names, running.stage.groups, "mean"))
        return result, turn.start + change.to(turn.start)

    def _train_submodel(
        self, learning_rate: float, turn: ClientTurn, layers: list[nn.Module]
    ) -> tuple[LocalResult, torch.Tensor]:
        """Local training of the model in use, whose layers these are."""
        self.engine.begin_client(turn.start, learning_rate, turn.trains)
        seed = client_seed(self.args.seed, self.state.global_step, turn.client)
        # Where processes share a batch, each draws its own dropout.
        set_seed(seed + self.placement.index if self.placement.shares_batches else seed)
        with self._without_layers(layers, turn.skips), self._tap(turn) as tap:
            result = self._local_training(self.model_wrapped, iter(turn.batches), tap)
        per_token = self._flops_per_token(turn, layers)
        result.flops = sum(count * flops for count, flops in zip(result.positions, per_token, strict=True))
        if tap is not None and (gradient := tap.mean_gradient()) is not None:
            if self.placement.shares_batches:  # each has seen the gradient of its share
                self._add_up(gradient)
                gradient /= self.placement.count
            result.mean_gradient = gradient
        return result, self.engine.read()

    def _flops_per_token(self, turn: ClientTurn, layers: list[nn.Module]) -> tuple[float, ...]:
        known, kind = self.engine.flops_per_token, (turn.trains, turn.skips)
        if kind not in known:
            self.engine.choose(turn.trains)
            base = self.model.get_base_model()
            known[kind] = flops_per_token(self.model, [layers[index] for index in turn.skips], encoders_of(base))
        return known[kind]

    def _without_layers(self, layers: list[nn.Module], skipped: tuple[int, ...]) -> AbstractContextManager:
        if not skipped:
            return nullcontext()
        running = self._running
        if running.in_tuple is None:
            running.in_tuple = returns_tuple(self.model_wrapped, layers)
        return without_layers(layers, skipped, running.in_tuple)

    def _tap(self, turn: ClientTurn) -> GradientTap | AbstractContextManager:
        if turn.gradient is None and not turn.records:
            return nullcontext()
        engine = self.engine
        return GradientTap(
            engine.parameters, engine.layout, engine.read, turn.gradient, turn.records, engine.loss_scale
        )
