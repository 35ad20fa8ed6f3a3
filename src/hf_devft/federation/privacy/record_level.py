"""DP-SGD within each client (Abadi et al. 2016): protects each of its rows, also from the server."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


# Of the sum of the rows' gradients: how far it may be from the batch's, which holds where rows are told apart.
_TOLERANCE = 0.02
# What its hooks keep of a forward pass, of one that has failed, too.
_LEFT_BY_OPACUS = ("activations", "max_batch_len")


@dataclass(frozen=True)
class RecordPrivacy:
    """Makes what a client sends differentially private for each of its rows (Abadi et al. 2016, arXiv 1607.00133,
    Algorithm 1), by Opacus.

    In each step, every row is drawn with the same chance; its gradient is scaled down to the clipping norm C; noise of
    standard deviation z·C is added to the sum, which is divided by the expected number of rows. A row's gradient is
    that of the sum of its tokens' losses, so that no row has a say in another's.

    Attributes:
        noise_multiplier: z. clipping_norm: C. batch_size: how many rows a step has on average.
        secret: what rows and noise are drawn by.
    """

    noise_multiplier: float
    clipping_norm: float
    batch_size: int
    secret: int

    def batches(self, rows: np.ndarray, round_index: int, client: int) -> Iterator[list[int]]:
        """Draw endless batches of a client's rows in a round: each row is in each of them with the same chance, so
        that they have `batch_size` on average, and may have none."""
        rng = np.random.default_rng([self.secret, round_index, client])
        chance = min(1.0, self.batch_size / len(rows))
        while True:
            yield rows[rng.random(len(rows)) < chance].tolist()

    def steps(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, start: torch.Tensor, round_index: int, client: int
    ) -> "PrivateSteps":
        """Return what makes a client's steps in a round private; a context manager.

        Args:
            model: whose trainable tensors are in `optimizer`. start: the adapter that it begins with, flat.
        """
        # Another noise for another start, so that the noise of a round that is run again cannot be taken away.
        seed = hashlib.sha256(f"{self.secret} {round_index} {client} ".encode() + start.cpu().numpy().tobytes())
        generator = torch.Generator(start.device)
        generator.manual_seed(int.from_bytes(seed.digest()[:8], "big", signed=True))
        return PrivateSteps(self, model, optimizer, generator)


class PrivateSteps:
    """Between the gradients of a client's rows and its optimiser; a context manager, see `RecordPrivacy`."""

    def __init__(
        self, privacy: RecordPrivacy, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ):
        self._privacy, self._model, self._generator = privacy, model, generator
        self._optimizer, self._is_checked = optimizer, False

    def __enter__(self) -> "PrivateSteps":
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer

        # Nothing below the lowest adapter needs a gradient, so that its input has none.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        self._hooks = GradSampleHooks(self._model, loss_reduction="sum")
        self._private = DPOptimizer(
            self._optimizer,
            noise_multiplier=self._privacy.noise_multiplier,
            max_grad_norm=self._privacy.clipping_norm,
            expected_batch_size=self._privacy.batch_size,
            generator=self._generator,
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.cleanup()
        for module in self._model.modules():
            for name in _LEFT_BY_OPACUS:
                vars(module).pop(name, None)

    def make_private(self) -> None:
        """Put the noisy mean of the rows' clipped gradients in the place of a batch's gradient.

        Raises:
            ValueError: the rows' gradients are not what the batch's is the sum of.
        """
        if not self._is_checked:
            self._check()
            self._is_checked = True
        self._private.pre_step()
        for parameter in self._private.params:  # of the next step
            parameter.grad_sample = parameter.summed_grad = None

    def _check(self) -> None:
        for parameter in self._private.params:
            rows, batch = parameter.grad_sample, parameter.grad
            if rows is None or (rows.sum(0) - batch).norm() > _TOLERANCE * batch.norm() + 1e-6:
                raise ValueError(
                    'dp_level="record" cannot tell the gradients of this model\'s rows apart: an adapted module does '
                    'not see a row in each line of its input. Set dp_level="client", or adapt other modules.'
                )
