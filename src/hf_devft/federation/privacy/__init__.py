"""Client-level differential privacy: what a round adds to its sum, and what all rounds together cost."""

from hf_devft.federation.privacy.accounting import SAMPLINGS, Accountant, find_noise_multiplier
from hf_devft.federation.privacy.mechanism import ADAPTIVE, ClientPrivacy
from hf_devft.federation.privacy.poisson import PoissonSampling
from hf_devft.federation.privacy.secret import read_secret


__all__ = [
    "ADAPTIVE",
    "SAMPLINGS",
    "Accountant",
    "ClientPrivacy",
    "PoissonSampling",
    "find_noise_multiplier",
    "read_secret",
]
