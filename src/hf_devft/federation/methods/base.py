"""What a federated method has to say: what a client receives, what it trains, what it sends, how updates combine."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_devft.federation.memory import SERVER, Memory
from hf_devft.models.layout import AdapterLayout, State


@dataclass
class Clients:
    """Who takes part.

    Attributes:
        examples: how many rows each client has.
        seed: of everything that a method draws.
        label_counts: () -> how often each token is a label, clients x vocabulary; what each counts for itself.
        memory: what outlives a round.
    """

    examples: Sequence[int]
    seed: int = 0
    label_counts: Callable[[], np.ndarray] | None = None
    memory: Memory = field(default_factory=Memory)


# What a method of one's own may still call by its earlier name, up to version 0.3.
_RENAMED = {
    "needs_room": "modifies_base_weights",
    "waits": "supports_late_updates",
    "aligned": "supports_error_feedback",
    "beside": "num_extra_values",
}


class FederatedMethod:
    """FedAvg over the tensors that clients send: θ ← θ + Σ_k n_k (θ_k − θ) / Σ_k n_k for each tensor, over the clients
    that sent it, n_k their examples (McMahan et al. 2017, arXiv 1602.05629, eq. 1).

    A method overrides what differs. `receives`, `trains` and `sends` name tensors by their places in `self.layout`;
    what a client trains and does not send stays with it, and its next training starts from there. An adapter is one
    flat vector; each process handles the clients that it trained, one at a time, so that memory does not grow with
    their number, and `merge` puts the processes together. Sums are float64 (our choice: the order of clients, and on
    which processes they were, then makes no difference after rounding), on the CPU where the device has none.

    The adapter that `end_round` returns is what is evaluated and published. Tensors that stay with the clients appear
    in it as the mean over the clients that have trained so far: the simulation knows it, no client ever sends it, and
    no training starts from it.

    Attributes:
        factors: needs LoRA's A and B, which it treats apart.
        products: works with their products, of one rank and scale everywhere.
        modifies_base_weights: changes the base's weights by more than an adapter (see `Residual`).
        partial: clients train only a part of the adapter.
        remembers: keeps values of adapters from round to round, beside the global adapter itself.
        corrects: adds to the gradients of local steps; `local_gradient` is asked.
        supports_error_feedback: a value of the adapter stands for the same thing in every round.
        optimizable: a server optimiser may step along the update.
        supports_late_updates: an update may arrive in a later round than the one that it was made in.
        averages: all clients of a round start from the same values and send the same tensors, and the server takes
            their mean as it is, so that noise (`fix_mean`) or a robust rule can take the mean's place.
    """

    factors = False
    products = False
    modifies_base_weights = False
    partial = False
    remembers = False
    corrects = False
    supports_error_feedback = True
    optimizable = True
    supports_late_updates = True
    averages = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is now called {new}: rename it.", FutureWarning, 2)
                setattr(cls, new, vars(cls)[old])

    def begin_run(self, clients: Clients) -> None:
        """Take note of who takes part; called once, before anything else."""
        self.clients, self.memory = clients, clients.memory

    def begin_stage(self, layout: AdapterLayout, adapter: torch.Tensor) -> None:
        """Begin a stage, with adapters of this layout and this global one. What is remembered has its depth."""
        self.layout = layout
        self.round_index, self.adapter = 0, adapter
        if (kept := self.kept) and self.memory.get(SERVER, "initial") is None:
            self.memory.put(SERVER, "initial", layout.state(adapter, kept))
            self.memory.commit()

    def end_stage(self) -> None:
        """End a stage."""

    def is_adapter(self, name: str) -> bool:
        """Whether what is remembered by this name are values of an adapter, not changes of one."""
        return name in ("kept", "initial")

    # --- what a client receives, trains and sends ---------------------------------------------------------

    def receives(self, client: int) -> tuple[int, ...]:
        """Return the places of the tensors that the server sends to a client."""
        return self.layout.all

    def trains(self, client: int) -> tuple[int, ...]:
        """Return the places of the tensors that a client trains."""
        return self.layout.all

    def sends(self, client: int) -> tuple[int, ...]:
        """Return the places of the tensors that a client sends back."""
        return self.trains(client)

    def skips(self, client: int) -> tuple[int, ...]:
        """Return the layers that a client leaves out of its model for the round."""
        return ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The tensors that stay with the clients, the same for all."""
        sent = set(self.sends(0))
        return tuple(place for place in self.trains(0) if place not in sent)

    @property
    def untransmitted(self) -> tuple[int, ...]:
        """The tensors that no message of a round has, and a client starts from: by default those that stay with the
        clients, before a client has trained them. Over a network, it is told them once a stage."""
        return self.kept

    def residual(self) -> State:
        """What the method adds to the base's weights beside the adapter, by module; nothing here (see `Residual`)."""
        return {}

    # --- a client's round -----------------------------------------------------------------------------------

    def begin_round(self, round_index: int, adapter: torch.Tensor, sampled: Sequence[int]) -> None:
        """Begin a round from the global adapter, with these clients; sets the sums to zero."""
        self.round_index, self.adapter, self.sampled = round_index, adapter, list(sampled)
        # Σ n_k (θ_k − θ), and behind it Σ n_k of each tensor.
        self.sums = self.zeros(adapter.numel() + len(self.layout))

    def zeros(self, count: int) -> torch.Tensor:
        """Float64 zeros; see `wide_zeros`."""
        return wide_zeros(count, self.adapter.device)

    def wide(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in float64, where the sums are."""
        return tensor.to(wide_zeros(0, self.adapter.device).device).double()

    def download(self, client: int) -> torch.Tensor:
        """Return the values that a client is sent, flat."""
        return self.layout.pick(self.adapter, self.receives(client))

    def exact_values(self, client: int) -> int:
        """How many values of the download are sent in float32 on any wire."""
        return 0

    def start(self, client: int, received: torch.Tensor) -> torch.Tensor:
        """Put together the adapter that a client starts from, of what it received (see `download`) and what it
        kept."""
        if received.numel() == self.adapter.numel():
            return received
        adapter = self.adapter.clone()
        self.layout.put(adapter, self.receives(client), received)
        if kept := self.kept:
            own = self.memory.get(client, "kept") or self.memory.get(SERVER, "initial")
            values = torch.cat([own[self.layout.keys[place]].flatten() for place in kept])
            self.layout.put(adapter, kept, values.to(adapter.device))
        return adapter

    def local_gradient(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to the gradient at `adapter` in each local step, or None."""
        return None

    def keep(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> None:
        """Remember what stays with a client that has trained `adapter`."""
        if not (kept := self.kept):
            return
        new, old = self.layout.pick(adapter, kept), self.layout.pick(start, kept)
        seen = self.memory.get(client, "kept") is not None
        self.add(kept, self.wide(new) - self.wide(old) if seen else self.wide(new), self.clients.examples[client])
        if seen:  # it counts in the mean already
            self.weights[list(kept)] -= self.clients.examples[client]
        self.memory.put(client, "kept", self.layout.state(adapter, kept))

    @property
    def num_extra_values(self) -> int:
        """How many numbers a client sends beside its payload."""
        return 0

    def payload(self, client: int, adapter: torch.Tensor) -> torch.Tensor:
        """Pick the values of `adapter` that a client sends, flat. The server takes the difference to what it
        started from, which both ends know."""
        return self.layout.pick(adapter, self.sends(client))

    def message_sizes(self, client: int) -> tuple[int, int]:
        """Count the values of a client's first messages of a stage, to it and from it."""
        return self.layout.count(self.receives(client)), self.layout.count(self.sends(client))

    # --- the server's round ---------------------------------------------------------------------------------

    def receive(self, client: int, start: torch.Tensor, payload: torch.Tensor) -> None:
        """Add a client's update to the sums, weighted by its examples. Tensors are reused: do not keep them.

        Args:
            start: the adapter that it started from. payload: what it sends.
        """
        difference = self.wide(payload) - self.wide(self.payload(client, start))
        self.add(self.sends(client), difference, self.clients.examples[client])

    @property
    def weights(self) -> torch.Tensor:
        """Σ n_k of each tensor, so far: the end of `sums`."""
        return self.sums[-len(self.layout) :]

    def add(self, places: Sequence[int], values: torch.Tensor, weight: float) -> None:
        """Add to the sums of the tensors at `places`."""
        self.layout.put(self.sums[: -len(self.layout)], places, self.wide(values), alpha=weight)
        self.weights[list(places)] += weight

    def merge(self, add_up: Callable[[torch.Tensor], None]) -> None:
        """Put the processes' sums together; called once on each, after its clients. `add_up` sums a tensor over the
        processes, in place."""
        add_up(self.sums)

    @property
    def num_sent_values(self) -> int:
        """How many values a client of the round sends, where all send the same."""
        return self.layout.count(self.sends(0))

    def fix_mean(self, noise: torch.Tensor, count: float) -> None:
        """After `merge`: add noise to the sums of what clients send, and divide them by `count` clients, however many
        there were. For methods that average, with clients of weight 1."""
        places = self.sends(0)
        self.layout.put(self.sums[: -len(self.layout)], places, self.wide(noise), alpha=1.0)
        self.weights[list(places)] = count

    def mean_update(self) -> torch.Tensor | None:
        """Return the mean of what the round's clients have changed, flat; None without any. After `merge`, and before
        `end_round`, which divides the sums in place."""
        weights = self.weights.repeat_interleave(torch.tensor(self.layout.sizes, device=self.weights.device))
        return self.sums[: -len(self.layout)] / weights.clamp_min(1) if weights.any() else None

    @property
    def updated(self) -> tuple[int, ...]:
        """After `merge`: the tensors that the round's clients have sent."""
        kept = set(self.kept)
        return tuple(place for place, weight in enumerate(self.weights.tolist()) if weight > 0 and place not in kept)

    def end_round(self) -> torch.Tensor:
        """End a round to which at least one client has contributed: divide the sums by the weights, in place. Returns
        the new global adapter."""
        step, weights = self.sums[: -len(self.layout)], self.weights.tolist()
        kept = set(self.kept)
        before = (self.memory.get(SERVER, "kept") or {}).get("examples", torch.tensor(0.0)).item()
        current = self.adapter.to(step.device).split(self.layout.sizes)
        for place, part in enumerate(step.split(self.layout.sizes)):
            if place in kept:  # Σ over all that have trained: a mean that this round's clients move
                part.sub_(current[place], alpha=weights[place])
                weights[place] += before
            if weights[place]:
                part /= weights[place]
        if kept:
            examples = torch.tensor(weights[next(iter(kept))], dtype=torch.float64)
            self.memory.put(SERVER, "kept", {"examples": examples})  # of all that have trained
        return (self.adapter.to(step.device) + step).float()


def wide_zeros(count: int, device: torch.device) -> torch.Tensor:
    """Float64 zeros on a device, or on the CPU where the device has no float64."""
    return torch.zeros(count, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
