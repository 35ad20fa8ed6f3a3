"""FedIT (Zhang et al. 2024, arXiv 2305.05644): FedAvg over the clients' LoRA A and B."""

from hf_devft.federation.methods.base import FederatedMethod


class FedIT(FederatedMethod):
    """Everything is received, trained and sent. The mean, weighted by examples, is `FederatedMethod.receive` and
    `end_round`."""

    averages = True
