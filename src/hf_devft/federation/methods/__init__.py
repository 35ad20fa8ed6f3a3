"""Federated methods: what travels and how it is combined. One file each, one line here."""

from hf_devft.federation.methods.base import FederatedMethod
from hf_devft.federation.methods.fedit import FedIT


METHODS: dict[str, type[FederatedMethod]] = {"fedit": FedIT}

__all__ = ["METHODS", "FedIT", "FederatedMethod"]
