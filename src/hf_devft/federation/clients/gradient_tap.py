"""Between a client's gradients and its optimiser."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from hf_devft.models.layout import AdapterLayout


class GradientTap:
    """Sees the adapter's gradients as they are computed, and adds to them; a context manager.

    By hooks on the parameters, so that it works alike before DDP's and DeepSpeed's own handling of gradients: what is
    added is the same on all processes, so their mean has it once.

    Args:
        parameters: the adapter's, in the order of `layout`.
        read: () -> the adapter as it is.
        correction: (adapter) -> what is added to the gradient there in each step, flat; or None.
        records: whether to add the gradients up, as they are before.
        scale: () -> the loss scale of mixed precision.

    Attributes:
        corrects: whether the backward pass under way is the step's last, in which the correction is added.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        layout: AdapterLayout,
        read: Callable[[], torch.Tensor],
        correction: Callable[[torch.Tensor], torch.Tensor] | None,
        records: bool,
        scale: Callable[[], float],
    ):
        self._parameters, self._layout, self._read = parameters, layout, read
        self._correction, self._records, self._scale = correction, records, scale
        self.corrects = False

    def __enter__(self) -> "GradientTap":
        self._steps, self._is_open = 0, False
        self._added: list[torch.Tensor] | None = None
        self._sum = torch.zeros_like(self._read()) if self._records else None
        self._step = torch.zeros_like(self._sum) if self._records else None
        self._parts = self._layout.cut(self._step) if self._records else []
        self._handles = [
            parameter.register_hook(partial(self._hook, place))
            for place, parameter in enumerate(self._parameters)
            if parameter.requires_grad
        ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def begin_step(self) -> None:
        """The gradients to come are of the adapter as it is now."""
        self._end_step()
        self._is_open = True
        if self._correction is not None:
            self._added = self._layout.cut(self._correction(self._read()))

    def mean_gradient(self) -> torch.Tensor | None:
        """Over the steps so far, flat; None where nothing is recorded. Steps that overflow in mixed precision, and
        that the optimiser leaves out, too, are left out."""
        if self._sum is None:
            return None
        self._end_step()
        return self._sum / max(1, self._steps)

    def _end_step(self) -> None:
        if self._sum is not None and self._is_open:
            if torch.isfinite(self._step).all():
                self._sum += self._step
                self._steps += 1
            self._step.zero_()
            self._is_open = False

    def _hook(self, place: int, gradient: torch.Tensor) -> torch.Tensor:
        scale = self._scale()
        if self._parts:
            self._parts[place] += gradient / scale
        if self._added is None or not self.corrects:
            return gradient
        return gradient + (scale * self._added[place]).to(gradient.dtype)
