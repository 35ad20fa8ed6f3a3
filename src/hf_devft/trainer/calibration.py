"""The loss of a base with only some of its layers, on calibration texts: what `grouping="calibrated"` asks."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_devft.models.layer_stack import LayerStack, with_layers
from hf_devft.stages.builder import SubmodelBuilder


class CalibrationLoss:
    """Measures, and remembers, the mean loss of the base with only some layers, without adapter. The processes share
    the batches, and the result does not depend on their number.

    Layers below the one that is left out compute what they compute with it, once for all candidates.

    Args:
        batches: () -> what the model reads of all calibration rows, the same on every process.
        loss: (model, inputs) -> the loss of a batch.
        prepare: called with every model before it is measured.
        autocast: () -> the context of a forward pass.
        device, process_index, world_size: of this process.
        seed: of what a collator draws.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
        prepare: Callable[[PreTrainedModel], Any],
        autocast: Callable[[], AbstractContextManager],
        device: torch.device,
        process_index: int,
        world_size: int,
        seed: int,
    ):
        self._batches, self._loss, self._prepare, self._autocast = batches, loss, prepare, autocast
        self._device, self._index, self._count, self._seed = device, process_index, world_size, seed
        self._known: dict[tuple[int, ...], float] = {}

    def of(self, builder: SubmodelBuilder) -> Callable[[Sequence[int], Sequence[int]], list[float]]:
        """(kept layers, candidates) -> the losses without each of the candidates. The whole base is read for the first
        that is not known, and held as long as this function is."""
        whole = cache(lambda: builder.whole().to(self._device))

        def losses_without(kept: Sequence[int], candidates: Sequence[int]) -> list[float]:
            keys = {each: tuple(layer for layer in kept if layer != each) for each in candidates}
            if new := [each for each, key in keys.items() if key not in self._known]:
                losses = self._measure(whole(), builder.stack, kept, new)
                self._known |= {keys[each]: loss for each, loss in zip(new, losses, strict=True)}
            return [self._known[key] for key in keys.values()]

        return losses_without

    @torch.no_grad()
    def _measure(
        self, whole: PreTrainedModel, stack: LayerStack, kept: Sequence[int], candidates: Sequence[int]
    ) -> list[float]:
        set_seed(self._seed)  # the same on every process, and in a run that goes on
        inputs = _LayerInputs(model := self._model(whole, stack, kept), stack, kept)
        # T5's first layer makes what all others need beside its output.
        goes_on = len(stack.names.lists) == 1 and not whole.config.is_encoder_decoder
        ends = [_without(kept, candidate, goes_on) for candidate in candidates]
        models = [self._model(whole, stack, layers) for _, layers in ends]
        for (start, layers), end in zip(ends, models, strict=True):
            if start is not None:
                inputs.feed(end, stack, layers, start)
        losses = {}
        for index, batch in enumerate(self._batches()):
            if index % self._count == self._index:
                with self._autocast():
                    if goes_on:
                        self._loss(model, dict(batch))  # fills `inputs`
                    # A loss of one's own may take the labels out of its batch.
                    losses[index] = [self._loss(end, dict(batch)).item() for end in models]
        parts = gather_object([losses]) if self._count > 1 else [losses]
        return np.mean([loss for _, loss in sorted(item for part in parts for item in part.items())], axis=0).tolist()

    def _model(self, whole: PreTrainedModel, stack: LayerStack, kept: Sequence[int]) -> PreTrainedModel:
        model = with_layers(whole, stack, kept).eval()
        self._prepare(model)
        return model


def _without(kept: Sequence[int], candidate: int, goes_on: bool) -> tuple[int | None, Sequence[int]]:
    """What is left to compute where one of the kept layers is left out: from the input of which of them (a place in
    `kept`; None, and where a model cannot go on from there: from the tokens), and with which layers."""
    place = kept.index(candidate)
    if not goes_on:
        return None, [layer for layer in kept if layer != candidate]
    # A model has at least one layer: where the last is left out, the one before is computed again.
    return (place, kept[place + 1 :]) if place + 1 < len(kept) else (place - 1, [kept[place - 1]])


class _LayerInputs:
    """The inputs of a model's layers in its last forward pass, for models that go on from there."""

    def __init__(self, model: PreTrainedModel, stack: LayerStack, kept: Sequence[int]):
        self._inputs: dict[int, torch.Tensor] = {}
        for place, layer in enumerate(stack.names.keeping(kept).layers(model)):
            layer.register_forward_pre_hook(partial(self._keep, place), with_kwargs=True)

    def feed(self, model: PreTrainedModel, stack: LayerStack, layers: Sequence[int], start: int) -> None:
        """Have a model of these layers begin with the input of layer `start`, whatever its embeddings say."""
        first = stack.names.keeping(layers).layers(model)[0]
        first.register_forward_pre_hook(partial(self._replace, start), with_kwargs=True)

    def _keep(self, place: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs[place] = args[0] if args else kwargs["hidden_states"]

    def _replace(self, place: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        known = self._inputs[place]
        return ((known, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": known})
