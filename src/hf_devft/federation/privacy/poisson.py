"""Poisson sampling: each client takes part by a throw of its own."""

import numpy as np

from hf_devft.federation.sampling import ClientSelection


class PoissonSampling(ClientSelection):
    """Each client takes part in a round with the same chance, independent of all others, so that a round has
    `clients_per_round` of them on average, and may have none."""

    def sample(self, round_index: int, attempt: int = 0) -> list[int]:
        chance = self.clients_per_round / len(self.candidates)
        throws = np.random.default_rng([self.seed, round_index, attempt]).random(len(self.candidates))
        return sorted(client for client, throw in zip(self.candidates, throws, strict=True) if throw < chance)
