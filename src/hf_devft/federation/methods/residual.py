"""Methods whose aggregate is more than an adapter: the rest changes the base's weights."""

from collections.abc import Sequence

import torch

from hf_devft.federation.memory import SERVER
from hf_devft.federation.methods.stacking import Stacking
from hf_devft.models.layout import LoraPair


class Residual(Stacking):
    """Keeps ΔW, dense, for every module: the model is the base + ΔW + the adapter.

    A client is sent the factors of the others that went into ΔW since it last took part, or where their product has
    fewer values, that; in a new stage, all of them again (our choice: it may not hold what its new layers were fused
    from).
    """

    modifies_base_weights = products = True
    starts_from_adapter = False  # which then is sent, too: it does not follow from ΔW

    def end_stage(self) -> None:
        for client in range(len(self.clients.examples)):
            self.memory.forget(client, "stacked")

    def residual(self) -> dict[str, torch.Tensor]:
        """ΔW (out x in) by the module's name with `RESIDUAL`; empty before the first round."""
        return self.memory.get(SERVER, "residual") or {}

    def add_residual(self, deltas: dict[str, torch.Tensor]) -> None:
        """Add to ΔW, and count the ranks of this round's clients."""
        before = self.residual()
        self.memory.put(SERVER, "residual", {
            key: delta.float() + (before[key].to(delta.device) if key in before else 0) for key, delta in
            deltas.items()
        })  # fmt: skip
        sent = int((self.rows[:, -1] > 0).sum()) * self._rank
        self.memory.put(SERVER, "stacked", {"rank": torch.tensor(self._stacked(SERVER) + sent)})

    @property
    def _rank(self) -> int:
        return self.layout.shapes[self.layout.pairs[0].a][0]

    def _stacked(self, owner: int | str) -> int:
        """Ranks that went into ΔW so far, or that a client has received."""
        state = self.memory.get(owner, "stacked")
        return 0 if state is None else int(state["rank"])

    def download(self, client: int) -> torch.Tensor:
        return placeholder_message(sum(self._message(client)))

    def exact_values(self, client: int) -> int:
        return self._message(client)[1]

    def _message(self, client: int) -> tuple[int, int]:
        """How many values of others' messages a client is sent, as these were sent, and how many of the server's own,
        which it has in float32."""
        missing = self._stacked(SERVER) - self._stacked(client)
        adapter = self._rank * self.starts_from_adapter
        first = adapter if self.memory.get(client, "stacked") is None else 0  # later ones follow from the factors
        relayed, own = 0, self.layout.count(self.layout.others)
        for pair in self.layout.pairs:
            into, out = self.layout.shapes[pair.a][1], self.layout.shapes[pair.b][0]
            each, dense = into + out, into * out + adapter * (into + out)
            by_factors = (missing + first) * each <= dense
            relayed += missing * each if by_factors else 0
            own += first * each if by_factors else dense
        return relayed, own

    def keep(self, client: int, start: torch.Tensor, adapter: torch.Tensor) -> None:
        known = self._stacked(SERVER) + self._rank  # and its own of this round
        self.memory.put(client, "stacked", {"rank": torch.tensor(known)})

    def mean_product(self, pair: LoraPair, adapters: Sequence, weights: Sequence[float]) -> torch.Tensor:
        """scaling · Σ_k p_k B_k A_k."""
        products = (w * (x[pair.b] @ x[pair.a]) for w, x in zip(weights, adapters, strict=True))
        return self.layout.scaling * sum(products, torch.zeros(()))


def placeholder_message(count: int) -> torch.Tensor:
    """`count` values that are sent to be put into the base's weights, where the simulation has them already."""
    return torch.zeros(1).expand(count)
