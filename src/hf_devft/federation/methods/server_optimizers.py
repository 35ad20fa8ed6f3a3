"""Server optimisers (Hsu et al. 2019, arXiv 1909.06335; Reddi et al. 2021, arXiv 2003.00295): a step along the
update."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim import SGD, Adagrad, Adam, Optimizer

from hf_devft.models.layout import AdapterLayout, State


class Yogi(Optimizer):
    """v ← v − (1 − β2) g² sign(v − g²), otherwise Adam without bias correction (Reddi et al. 2021, Algorithm 2)."""

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if gradient is None:
                    continue
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, group["eps"] ** 2)  # v_0 = τ²
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                square = gradient.square()
                state["exp_avg_sq"] -= (1 - beta2) * square * (state["exp_avg_sq"] - square).sign()
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])


class ServerOptimizer(ABC):
    """Takes θ_t − (the clients' aggregate) for a gradient and steps with an optimiser of `torch.optim`.

    Its state begins anew with a stage (our choice: second moments cannot be fused).

    Args (of each those that its optimiser has):
        server_learning_rate: of `fedavgm` by default 1 − β1, with which the steps of an update that stays the same add
            up to that update; of the adaptive ones 0.01, about the size of their steps in every coordinate (our
            choices; on 12 rounds of the quickstart's task 0.001 and 0.003 were far worse, 0.02 a little).
        server_momentum: β1, default 0.9.
        server_beta2: β2, default 0.99.
        server_tau: τ, default 0.001 (Reddi et al., §5 and appendix D, for all three).

    Raises:
        ValueError: a learning rate or τ of 0 or less, a β outside of [0, 1).
    """

    def __init__(
        self,
        server_learning_rate: float | None = None,
        server_momentum: float = 0.9,
        server_beta2: float = 0.99,
        server_tau: float = 1e-3,
    ):
        rate = self.default_rate(server_momentum) if server_learning_rate is None else server_learning_rate
        if rate <= 0 or server_tau <= 0 or not (0 <= server_momentum < 1 and 0 <= server_beta2 < 1):
            raise ValueError(
                f"server_learning_rate={rate}, server_tau={server_tau}, server_momentum={server_momentum}, "
                f"server_beta2={server_beta2}: give rate and tau above 0, and momenta from 0 to below 1."
            )
        self.rate, self.tau, self.betas = rate, server_tau, (server_momentum, server_beta2)

    def default_rate(self, momentum: float) -> float:
        """See `server_learning_rate`."""
        return 0.01

    @abstractmethod
    def make(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        """The optimiser of one stage."""

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        """Begin a stage, with adapters of this layout, with a fresh optimiser."""
        self._layout = layout
        self._parameters = [torch.nn.Parameter(part.clone()) for part in layout.cut(adapter)]
        self._optimizer = self.make(self._parameters)

    def step(self, adapter: torch.Tensor, aggregate: torch.Tensor, updated: Sequence[int]) -> torch.Tensor:
        """Take a step; returns the new global adapter. Tensors that the round's clients have sent, at the places
        `updated`, take the step; the others are the aggregate's."""
        current, wanted, sent = self._layout.cut(adapter), self._layout.cut(aggregate), set(updated)
        for place, parameter in enumerate(self._parameters):
            parameter.data = current[place].clone()
            parameter.grad = current[place] - wanted[place] if place in sent else None
        self._optimizer.step()
        parts = [p.data if p.grad is not None else wanted[place] for place, p in enumerate(self._parameters)]
        return torch.cat([part.flatten() for part in parts])

    def end_stage(self) -> None:
        """Drop the optimiser's state."""
        self._optimizer.state.clear()

    def state_dict(self) -> State:
        """{"key/name": tensor}."""
        return {
            f"{key}/{name}": torch.as_tensor(value)
            for key, parameter in zip(self._layout.keys, self._parameters, strict=True)
            for name, value in self._optimizer.state[parameter].items()
            if value is not None
        }

    def load_state_dict(self, state: State) -> None:
        parameters = dict(zip(self._layout.keys, self._parameters, strict=True))
        for path, value in state.items():
            key, _, name = path.rpartition("/")
            device = "cpu" if name == "step" else parameters[key].device
            self._optimizer.state[parameters[key]][name] = value.to(device)


class FedAvgM(ServerOptimizer):
    """SGD with momentum (Hsu et al. 2019, §3)."""

    def __init__(self, server_learning_rate: float | None = None, server_momentum: float = 0.9):
        super().__init__(server_learning_rate, server_momentum)

    def default_rate(self, momentum: float) -> float:
        return 1 - momentum

    def make(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        return SGD(parameters, lr=self.rate, momentum=self.betas[0])


class FedAdagrad(ServerOptimizer):
    """Adagrad; without momentum, as `torch.optim` has it."""

    def __init__(self, server_learning_rate: float | None = None, server_tau: float = 1e-3):
        super().__init__(server_learning_rate, server_tau=server_tau)

    def make(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        return Adagrad(parameters, lr=self.rate, initial_accumulator_value=self.tau**2, eps=self.tau)


class FedAdam(ServerOptimizer):
    """Adam, with bias correction, as `torch.optim` has it."""

    def make(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=self.rate, betas=self.betas, eps=self.tau)


class FedYogi(ServerOptimizer):
    """Yogi, which `torch.optim` does not have."""

    def make(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        return Yogi(parameters, lr=self.rate, betas=self.betas, eps=self.tau)


SERVER_OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
