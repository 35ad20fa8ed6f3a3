"""The privacy account of a run, by its config."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.privacy import (
    Accountant,
    ClientAccountant,
    RecordAccountant,
    affordable,
    find_noise_multiplier,
)
from hf_devft.federation.sampling import sample_clients


logger = logging.getLogger(__name__)


def draws_of(args: DevFTConfig, rounds: Iterable[tuple[int, Sequence[int]]]) -> list[Any]:
    """Say of rounds how their clients are drawn, as the run's accountant has it: the number of those it draws from, or
    the clients that take part.

    Args:
        rounds: of each, its index, and the clients that can hold its stage.
    """
    if not args.protects_records:
        return [len(candidates) for _, candidates in rounds]
    return [sample_clients(candidates, args.clients_per_round, args.seed, index) for index, candidates in rounds]


def make_accountant(args: DevFTConfig, draws: Sequence[Any], examples: Sequence[int]) -> Accountant | None:
    """Make the accountant of a differentially private run, with the noise that its budget asks for where the config
    names none; None of a run that is not private.

    Args:
        draws: of each planned round, as `draws_of` has it. examples: how many rows each client has.

    Raises:
        ValueError: a δ that protects nobody, or a budget that does not last for one round.
    """
    if not args.is_private:
        return None
    per_client = args.protects_clients
    most, whom = (max(draws), "clients") if per_client else (max(examples), "rows")
    if most * args.dp_delta >= 1:
        raise ValueError(f"dp_delta={args.dp_delta} lets one of {most} {whom} be laid bare: give much less.")
    make = partial(
        ClientAccountant, clients_per_round=args.clients_per_round, sampling=args.dp_sampling, delta=args.dp_delta
    ) if per_client else partial(
        RecordAccountant, examples=tuple(examples), batch_size=args.train_batch_size, steps=args.local_steps,
        delta=args.dp_delta,
    )  # fmt: skip
    noise, target = args.dp_noise_multiplier, args.dp_target_epsilon
    if noise is None:
        assert target is not None
        return make(find_noise_multiplier(target, draws, make))
    accountant = make(noise)
    if target is not None:
        lasts = affordable(accountant, draws, target)
        if not lasts:
            raise ValueError(
                f"dp_target_epsilon={target} does not last for a round with dp_noise_multiplier={noise}: raise either."
            )
        if lasts < len(draws):
            logger.warning(f"dp_target_epsilon={target} lasts for {lasts} of {len(draws)} rounds.")
    return accountant
