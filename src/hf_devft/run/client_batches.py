"""Which rows are in the batches of local trainings: what a run draws, and its plan counts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.batches import FederatedBatchSampler
from hf_devft.federation.sampling import Placement


def make_sampler(
    args: DevFTConfig,
    rows: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    order: Iterable[tuple[int, int]],
    placement: Placement,
) -> FederatedBatchSampler:
    """Make what draws the batches of local trainings, (round, client), in this order, as rows.

    Args:
        rows: each client's, by its number.
        placement: this process's share of each batch.
    """
    return FederatedBatchSampler(
        rows=rows,
        turns=order,
        batches_per_client=args.local_steps * args.gradient_accumulation_steps,
        batch_size=args.train_batch_size,
        drop_last=args.dataloader_drop_last,
        data_seed=args.seed if args.data_seed is None else args.data_seed,
        placement=placement,
    )
