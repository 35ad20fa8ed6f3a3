"""The privacy account of a run, by its config."""

import logging
from collections.abc import Sequence

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.privacy import Accountant, find_noise_multiplier


logger = logging.getLogger(__name__)


def make_accountant(args: DevFTConfig, populations: Sequence[int]) -> Accountant | None:
    """Make the accountant of a differentially private run, with the noise that its budget asks for where the config
    names none; None of a run that is not private.

    Args:
        populations: of each planned round, from how many clients it draws.

    Raises:
        ValueError: a δ that protects nobody, or a budget that does not last for one round.
    """
    if not args.is_private:
        return None
    if (most := max(populations)) * args.dp_delta >= 1:
        raise ValueError(f"dp_delta={args.dp_delta} lets one of {most} clients be laid bare: give much less.")
    noise, target = args.dp_noise_multiplier, args.dp_target_epsilon
    rest = (args.clients_per_round, args.dp_sampling, args.dp_delta)
    if noise is None:
        assert target is not None
        return Accountant(find_noise_multiplier(target, populations, *rest), *rest)
    accountant = Accountant(noise, *rest)
    if target is not None:
        lasts = accountant.affordable(populations, target)
        if not lasts:
            raise ValueError(
                f"dp_target_epsilon={target} does not last for a round with dp_noise_multiplier={noise}: raise either."
            )
        if lasts < len(populations):
            logger.warning(f"dp_target_epsilon={target} lasts for {lasts} of {len(populations)} rounds.")
    return accountant
