"""Differential privacy, of clients or of their rows: what is added to a sum, and what all rounds together cost."""

from hf_devft.federation.privacy.accounting import (
    LEVELS,
    SAMPLINGS,
    Accountant,
    ClientAccountant,
    RecordAccountant,
    affordable,
    find_noise_multiplier,
)
from hf_devft.federation.privacy.mechanism import ADAPTIVE, ClientPrivacy, split_noise
from hf_devft.federation.privacy.poisson import PoissonSampling
from hf_devft.federation.privacy.record_level import PrivateSteps, RecordPrivacy, RowsApart
from hf_devft.federation.privacy.secret import read_secret


__all__ = [
    "ADAPTIVE",
    "LEVELS",
    "SAMPLINGS",
    "Accountant",
    "ClientAccountant",
    "ClientPrivacy",
    "PoissonSampling",
    "PrivateSteps",
    "RecordAccountant",
    "RecordPrivacy",
    "RowsApart",
    "affordable",
    "find_noise_multiplier",
    "read_secret",
    "split_noise",
]
