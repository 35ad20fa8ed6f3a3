"""The loss of a base with only some of its layers, on calibration texts: what `grouping="calibrated"` asks."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from hf_devft.models.layer_stack import with_layers
from hf_devft.stages.builder import SubmodelBuilder


class CalibrationLoss:
    """Measures, and remembers, the mean loss of the base with only some layers, without adapter. The processes share
    the batches, and the result does not depend on their number.

    Args:
        batches: () -> what the model reads of all calibration rows, the same on every process.
        loss: (model, inputs) -> the loss of a batch.
        autocast: () -> the context of a forward pass.
        device, process_index, world_size: of this process.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
        autocast: Callable[[], AbstractContextManager],
        device: torch.device,
        process_index: int,
        world_size: int,
    ):
        self._batches, self._loss, self._autocast = batches, loss, autocast
        self._device, self._index, self._count = device, process_index, world_size
        self._known: dict[tuple[int, ...], float] = {}

    def of(self, builder: SubmodelBuilder) -> Callable[[list[int]], float]:
        """(kept layers) -> the loss. The whole base is read for the first that is not known, and held as long as this
        function is."""
        whole = cache(lambda: builder.whole().to(self._device))

        def loss_of(kept: list[int]) -> float:
            if (key := tuple(kept)) not in self._known:
                self._known[key] = self._measure(with_layers(whole(), builder.stack, kept).eval())
            return self._known[key]

        return loss_of

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> float:
        losses = {}
        for index, inputs in enumerate(self._batches()):
            if index % self._count == self._index:
                with self._autocast():
                    losses[index] = self._loss(model, inputs).item()
        parts = gather_object([losses]) if self._count > 1 else [losses]
        return float(np.mean([loss for _, loss in sorted(item for part in parts for item in part.items())]))
