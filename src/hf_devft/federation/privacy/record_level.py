"""DP-SGD within each client (Abadi et al. 2016): protects each of its rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_devft.federation.privacy.noise import gaussian
from hf_devft.federation.sampling import client_seed


@dataclass(frozen=True)
class RecordPrivacy:
    """Makes a client's update differentially private for each of its rows (Abadi et al. 2016, arXiv 1607.00133,
    Algorithm 1).

    In each step, every row is drawn with the same chance; its gradient is scaled down to the clipping norm C; noise of
    standard deviation z·C is added to the sum, which is divided by the expected number of rows.

    Each row goes through the model alone. Tools that take a batch apart (Opacus' hooks) need every module to see a row
    in each line of its input, and a loss in which rows do not share a divisor; a model that flattens rows into tokens,
    or balances its experts over a batch, would break the bound without a sign.

    Attributes:
        noise_multiplier: z. clipping_norm: C. batch_size: how many rows a step has on average, of a client's that has
            more.
        secret: what rows, dropout and noise are drawn by.
        examples: how many rows each client has.
    """

    noise_multiplier: float
    clipping_norm: float
    batch_size: int
    secret: int
    examples: Sequence[int]

    def batches(self, rows: np.ndarray, round_index: int, client: int) -> Iterator[list[int]]:
        """Draw endless batches of a client's rows in a round: each row is in each of them with the same chance, so
        that they have `batch_size` on average, and may have none."""
        rng = np.random.default_rng([self.secret, round_index, client])
        chance = min(1.0, self.batch_size / len(rows))
        while True:
            yield rows[rng.random(len(rows)) < chance].tolist()

    def seed(self, round_index: int, client: int) -> int:
        """Of dropout in a client's round: as unknown as the rows."""
        return client_seed(self.secret, round_index, client)

    def steps(self, parameters: Sequence[nn.Parameter], round_index: int, client: int) -> "PrivateSteps":
        """Return what makes a client's steps in a round private.

        Args:
            parameters: the adapter's.
        """
        return PrivateSteps(self, parameters, (round_index, client))


class PrivateSteps:
    """Between the gradients of a client's rows and its optimiser; see `RecordPrivacy`."""

    def __init__(self, privacy: RecordPrivacy, parameters: Sequence[nn.Parameter], turn: tuple[int, int]):
        self._privacy, self._turn, self._step = privacy, turn, 0
        self._expected = min(privacy.batch_size, privacy.examples[turn[1]])
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._begin_step()

    def add_row(self) -> None:
        """Add a row's gradient, clipped, to the step's sum, and drop it."""
        found = [parameter.grad for parameter in self._parameters]
        norms = [gradient.norm() for gradient in found if gradient is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        counts = 0 < norm < float("inf")  # a row that is not finite counts as nothing
        for total, gradient, parameter in zip(self._sums, found, self._parameters, strict=True):
            if gradient is not None and counts:
                total.add_(gradient, alpha=min(1.0, self._privacy.clipping_norm / norm))
            parameter.grad = None

    def end_step(self) -> None:
        """Put the noisy mean of the step's rows in the place of the gradient."""
        privacy = self._privacy
        flat = torch.cat([total.flatten() for total in self._sums])
        rule = (privacy.noise_multiplier, privacy.clipping_norm, privacy.batch_size)
        drawn = gaussian(flat.numel(), privacy.secret, *self._turn, self._step, rule, flat)
        noise = (drawn * privacy.noise_multiplier * privacy.clipping_norm).to(flat)
        noisy = ((flat + noise) / self._expected).split([total.numel() for total in self._sums])
        for parameter, gradient in zip(self._parameters, noisy, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self._step += 1
        self._begin_step()

    def _begin_step(self) -> None:
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]


@dataclass(frozen=True)
class RowsApart:
    """A collator that makes an input of each row, and of no rows none."""

    collate: Callable[[list], dict[str, Any]]

    def __call__(self, rows: list) -> list[dict[str, Any]]:
        return [self.collate([row]) for row in rows]
