"""Which rows are in the batches of local trainings: what a run draws, and its plan counts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.batches import FederatedBatchSampler
from hf_devft.federation.privacy import RecordPrivacy
from hf_devft.federation.sampling import Placement


def make_sampler(
    args: DevFTConfig,
    dataset: Dataset,
    rows: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    order: Iterable[tuple[int, int]],
    placement: Placement,
    privacy: RecordPrivacy | None = None,
) -> FederatedBatchSampler:
    """Make what draws the batches of local trainings, (round, client), in this order, as rows.

    Args:
        dataset: all clients' rows, with all of their columns.
        rows: each client's, by its number.
        placement: this process's share of each batch.
        privacy: of the clients' rows, for which each is drawn by chance; or None.

    Raises:
        ValueError: lengths are asked for, and not known.
    """
    by_length = args.train_sampling_strategy == "group_by_length"
    return FederatedBatchSampler(
        rows=rows,
        turns=order,
        batches_per_client=args.local_steps * args.gradient_accumulation_steps,
        batch_size=args.train_batch_size,
        drop_last=args.dataloader_drop_last,
        data_seed=args.seed if args.data_seed is None else args.data_seed,
        placement=placement,
        lengths=lengths_of(dataset, args.length_column_name) if by_length else None,
        privacy=privacy,
    )


def lengths_of(dataset: Dataset, column: str = "length") -> np.ndarray:
    """Return the lengths of a dataset's rows: those in a column of this name, or of their `input_ids`, or of their
    sound, `input_values`.

    Raises:
        ValueError: it has neither.
    """
    names = getattr(dataset, "column_names", None) or []
    if column in names:
        return np.asarray(dataset[column][:])
    main = next((name for name in ("input_ids", "input_values") if name in names), None)
    if main is None:
        raise ValueError(
            f'train_sampling_strategy="group_by_length" needs a column {column!r} or "input_ids"; there are {names}. '
            'Add one, or set "random".'
        )
    values = dataset.select_columns(main).with_format("arrow")[:].column(0)
    return pc.list_value_length(values).to_numpy()
