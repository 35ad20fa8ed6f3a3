"""What the user says of what a run shows of its clients."""

from dataclasses import dataclass, field

from hf_devft.federation.privacy import ADAPTIVE, SAMPLINGS


@dataclass
class PrivacyOptions:
    """
    What a run shows of its clients: the options of `DevFTConfig` for differential privacy and secure aggregation.

    > Parameters that control privacy

        secure_aggregation (`bool`, *optional*, defaults to `False`):
            Over a network, the server sees only the sum of a round's updates; see docs/federation.md.

        dp_noise_multiplier (`float`, *optional*):
            Makes the adapters differentially private for each client (DP-FedAvg): each update is scaled down to
            `dp_clipping_norm`, and the sum of a round's gets Gaussian noise of so many of these norms.
        dp_target_epsilon (`float`, *optional*):
            ε that the run may cost. The noise is what its rounds need for that; with `dp_noise_multiplier` given, too,
            the run ends before the round that would go beyond.
        dp_delta (`float`, *optional*, defaults to `1e-5`):
            δ of that; less than one in as many as there are clients.
        dp_clipping_norm (`float` or `str`, *optional*, defaults to `"adaptive"`):
            The norm, or `"adaptive"`: it follows the median of the updates' norms.
        dp_sampling (`str`, *optional*, defaults to `"poisson"`):
            How a round's clients are drawn, and accounted for: `"poisson"`, each with the same chance, so that
            `clients_per_round` take part on average, or `"fixed_size"`, just as many, which costs more.
    """

    secure_aggregation: bool = field(default=False, metadata={"help": "The server sees only sums of updates."})
    dp_noise_multiplier: float | None = field(
        default=None, metadata={"help": "Differential privacy: noise of a round's sum, in clipping norms."}
    )
    dp_target_epsilon: float | None = field(
        default=None, metadata={"help": "Differential privacy: the most that a run may cost."}
    )
    dp_delta: float = field(default=1e-5, metadata={"help": "Delta of that epsilon."})
    dp_clipping_norm: float | str | None = field(
        default=None, metadata={"help": f"Norm that a client's update is scaled down to, or {ADAPTIVE} (default)."}
    )
    dp_sampling: str = field(
        default=SAMPLINGS[0], metadata={"help": f"How a round's clients are drawn: {', '.join(SAMPLINGS)}."}
    )

    @property
    def is_private(self) -> bool:
        """Whether the run is differentially private."""
        return self.dp_noise_multiplier is not None or self.dp_target_epsilon is not None


def settle_privacy(options: PrivacyOptions) -> None:
    """Settle the clipping norm, in place: a number, or adaptive.

    Raises:
        ValueError: it is neither; or options of differential privacy without what turns it on.
    """
    norm = options.dp_clipping_norm
    if not options.is_private:
        if norm is not None:
            raise ValueError(
                f"dp_clipping_norm={norm!r} without noise protects nobody: give dp_noise_multiplier or "
                'dp_target_epsilon, or clip by federated_method="fedit+norm_clipping".'
            )
        return
    if norm is None or norm == ADAPTIVE:
        options.dp_clipping_norm = ADAPTIVE
        return
    try:
        options.dp_clipping_norm = float(norm)
    except ValueError:
        raise ValueError(f'dp_clipping_norm={norm!r}: give a norm above 0, or "{ADAPTIVE}".') from None
    if not 0 < options.dp_clipping_norm < float("inf"):
        raise ValueError(f'dp_clipping_norm={norm}: give a norm above 0, or "{ADAPTIVE}".')
