"""What the user says of what a run shows of its clients."""

from dataclasses import dataclass, field

from hf_devft.federation.privacy import ADAPTIVE, LEVELS, SAMPLINGS


_NORM_OF_RECORDS = 1.0  # as in Opacus


@dataclass
class PrivacyOptions:
    """
    What a run shows of its clients: the options of `DevFTConfig` for differential privacy and secure aggregation.

    > Parameters that control privacy

        secure_aggregation (`bool`, *optional*, defaults to `False`):
            Over a network, the server sees only the sum of a round's updates; see docs/federation.md.

        dp_noise_multiplier (`float`, *optional*):
            Makes the adapters differentially private: updates, or the gradients of rows (see `dp_level`), are scaled
            down to `dp_clipping_norm`, and their sum gets Gaussian noise, whose standard deviation is this many of
            these norms.
        dp_level (`str`, *optional*, defaults to `"client"`):
            Whom that protects: each `"client"` with all its rows (DP-FedAvg: a round's updates are summed up and get
            noise at the server), or each `"record"` of a client (DP-SGD: each local step has noise, and
            `per_device_train_batch_size` rows on average, each of which goes through the model alone).
        dp_target_epsilon (`float`, *optional*):
            ε that the run may cost. The noise is what its rounds need for that; with `dp_noise_multiplier` given, too,
            the run ends before the round that would go beyond.
        dp_delta (`float`, *optional*, defaults to `1e-5`):
            δ of that; less than one in as many as there are clients, or rows of a client.
        dp_clipping_norm (`float` or `str`, *optional*, defaults to `"adaptive"`):
            The norm, or `"adaptive"`: it follows the median of the updates' norms. Of records: a number, 1 by default,
            as in Opacus.
        dp_sampling (`str`, *optional*, defaults to `"poisson"`):
            How a round's clients are drawn, and accounted for: `"poisson"`, each with the same chance, so that
            `clients_per_round` take part on average, or `"fixed_size"`, just as many, which costs more. Of records,
            rows are always drawn with the same chance, and who takes part is no secret.
    """

    secure_aggregation: bool = field(default=False, metadata={"help": "The server sees only sums of updates."})
    dp_noise_multiplier: float | None = field(
        default=None, metadata={"help": "Differential privacy: noise of a sum, in clipping norms."}
    )
    dp_level: str = field(default=LEVELS[0], metadata={"help": f"Whom that protects: {', '.join(LEVELS)}."})
    dp_target_epsilon: float | None = field(
        default=None, metadata={"help": "Differential privacy: the most that a run may cost."}
    )
    dp_delta: float = field(default=1e-5, metadata={"help": "Delta of that epsilon."})
    dp_clipping_norm: float | str | None = field(
        default=None, metadata={"help": f"Norm that updates, or rows' gradients, are scaled down to, or {ADAPTIVE}."}
    )
    dp_sampling: str = field(
        default=SAMPLINGS[0], metadata={"help": f"How a round's clients are drawn: {', '.join(SAMPLINGS)}."}
    )

    @property
    def is_private(self) -> bool:
        """Whether the run is differentially private."""
        return self.dp_noise_multiplier is not None or self.dp_target_epsilon is not None

    @property
    def protects_records(self) -> bool:
        """Whether the run is differentially private for each row."""
        return self.is_private and self.dp_level == "record"

    @property
    def protects_clients(self) -> bool:
        """Whether the run is differentially private for each client with all its rows."""
        return self.is_private and self.dp_level == "client"


def settle_privacy(options: PrivacyOptions) -> None:
    """Settle the clipping norm, in place: a number, or adaptive.

    Raises:
        ValueError: it is neither; or options of differential privacy without what turns it on.
    """
    norm = options.dp_clipping_norm
    if not options.is_private:
        if options.dp_level == "record":
            raise ValueError(
                "dp_level='record' without noise protects nobody: give dp_target_epsilon or dp_noise_multiplier."
            )
        if norm is not None:
            raise ValueError(
                f"dp_clipping_norm={norm!r} without noise protects nobody: give dp_noise_multiplier or "
                'dp_target_epsilon, or clip by federated_method="fedit+norm_clipping".'
            )
        for option in ("dp_delta", "dp_sampling"):
            if (value := getattr(options, option)) != getattr(PrivacyOptions, option):
                raise ValueError(
                    f"{option}={value!r} without noise means nothing: give dp_noise_multiplier or dp_target_epsilon, "
                    "or leave it out."
                )
        return
    of_records = options.dp_level == "record"
    if of_records and options.dp_sampling != "poisson":
        raise ValueError(f"dp_sampling={options.dp_sampling!r}: rows are drawn by chance alone, set 'poisson'.")
    allowed = "a norm above 0" if of_records else f'a norm above 0, or "{ADAPTIVE}"'
    if norm is None:
        norm = _NORM_OF_RECORDS if of_records else ADAPTIVE
    if norm == ADAPTIVE and not of_records:
        options.dp_clipping_norm = ADAPTIVE
        return
    try:
        options.dp_clipping_norm = float(norm)
    except ValueError:
        raise ValueError(f"dp_clipping_norm={norm!r}: give {allowed}.") from None
    if not 0 < options.dp_clipping_norm < float("inf"):
        raise ValueError(f"dp_clipping_norm={norm}: give {allowed}.")
