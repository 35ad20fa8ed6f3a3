"""DP-FedAvg: clipped updates, a mean over as many clients as were to be expected, and Gaussian noise."""

import math
from collections.abc import Callable

import torch

from hf_devft.federation.memory import SERVER, Memory
from hf_devft.federation.methods import FederatedMethod
from hf_devft.federation.privacy.noise import gaussian


ADAPTIVE = "adaptive"
# Andrew et al. 2021, §3: γ, the part of the clients whose updates are within the clipping norm; η, how fast the norm
# follows; the norm in the first round is ours (LoRA's updates on our bases have norms of 0.3 to 3).
_QUANTILE, _RATE, _FIRST_NORM = 0.5, 0.2, 1.0
_CLIPPING = "clipping"
# Of C's power of two: updates are cut to multiples of it, so that their sum does not depend on its order.
_GRID = 2.0**-30


class ClientPrivacy:
    """Makes a round's mean differentially private for each client (McMahan et al. 2018, arXiv 1710.06963, Algorithm
    1, with the fixed denominator q·W of its eq. 2 and all clients of weight 1).

    An update is all that a client sends. Each is scaled down to the clipping norm C; noise of standard deviation z·C
    is added to their sum, which is divided by the expected number of clients, however many have answered. What follows
    (server optimiser, transfer to full depth, fusion into the next stage, distillation, evaluation on the server's
    rows) only sees the noisy mean, and costs nothing: it is post-processing.

    With `"adaptive"`, C follows the median of the updates' norms (Andrew et al. 2021, arXiv 1905.03871, Algorithm 1).
    How many are within C is told with noise of its own, σ_b = clients / 20; the updates get the more noise that both
    together cost what z says.

    Args:
        noise_multiplier: z.
        clipping_norm: C, or "adaptive".
        expected_clients: how many a round has on average.
        secret: what the noise is drawn by.
        memory: keeps an adaptive norm.

    Raises:
        ValueError: too few clients a round for an adaptive norm.
    """

    def __init__(
        self,
        noise_multiplier: float,
        clipping_norm: float | str,
        expected_clients: int,
        secret: int,
        memory: Memory,
    ):
        self.is_adaptive = clipping_norm == ADAPTIVE
        self.expected_clients = expected_clients
        self._first_norm = _FIRST_NORM if self.is_adaptive else float(clipping_norm)
        self._secret, self._memory = secret, memory
        self._update_noise, self._count_noise = noise_multiplier, 0.0
        if self.is_adaptive:
            self._update_noise, self._count_noise = split_noise(noise_multiplier, expected_clients)

    @property
    def clipping_norm(self) -> float:
        """C, in the running round."""
        state = self._memory.get(SERVER, _CLIPPING)
        return self._first_norm if state is None else state["norm"].item()

    @property
    def grid(self) -> float:
        """What clipped updates are whole multiples of, in the running round; a power of two."""
        return 2.0 ** math.ceil(math.log2(self.clipping_norm)) * _GRID

    def begin_round(self) -> None:
        """Begin a round, or another attempt at it: nobody has been within C so far."""
        self._within = torch.zeros(1, dtype=torch.float64)  # Σ (b_k − ½)

    def clip(self, update: torch.Tensor) -> torch.Tensor:
        """Scale a client's update down to C, and cut it to the grid, towards 0."""
        norm, bound = update.norm().item(), self.clipping_norm
        self._within += (norm <= bound) - 0.5
        scaled, grid = update * min(1.0, bound / norm) if norm > 0 else update, self.grid
        return (scaled / grid).trunc() * grid

    def merge(self, add_up: Callable[[torch.Tensor], None], device: torch.device) -> None:
        """Put the processes' counts together."""
        within = self._within.to(device, torch.float32)  # halves of whole numbers, which are exact
        add_up(within)
        self._within = within.cpu().double()

    def end_round(self, method: FederatedMethod, round_index: int) -> None:
        """Add the noise to a method's sums, after its `merge`, and adapt C; the same on all processes."""
        bound, grid = self.clipping_norm, self.grid
        method.sums.copy_((method.sums / grid).round() * grid)  # the same on any number of processes
        # Another noise for other sums: that of a round that is run again with other answers cannot be taken away.
        covers = (round_index, self._update_noise, bound, method.sums)
        noise = gaussian(method.num_sent_values, self._secret, *covers) * self._update_noise * bound
        method.fix_mean(noise, self.expected_clients)
        if self.is_adaptive:
            drawn = gaussian(1, self._secret, "count", *covers, self._within) * self._count_noise
            within = ((self._within + drawn) / self.expected_clients + 0.5).item()
            norm = bound * math.exp(-_RATE * (within - _QUANTILE))
            self._memory.put(SERVER, _CLIPPING, {"norm": torch.tensor(norm, dtype=torch.float64)})


def split_noise(noise_multiplier: float, expected_clients: int) -> tuple[float, float]:
    """Return z of the updates' sum, and the standard deviation of the noise in the count of those within C, that cost
    together what `noise_multiplier` says (Andrew et al. 2021, Theorem 1).

    Raises:
        ValueError: there are too few clients for that.
    """
    count_noise = expected_clients / 20
    if 2 * count_noise <= noise_multiplier:
        raise ValueError(
            f'dp_clipping_norm="adaptive" needs more clients a round than 10 times the noise multiplier: '
            f"clients_per_round={expected_clients} and {noise_multiplier:.3g}. Raise the one, or set a number as "
            "`dp_clipping_norm`."
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise
