"""What a client can say of its data: the distribution of its labels, in a few numbers."""

from collections.abc import Sequence

import numpy as np
import pyarrow
from datasets import Dataset

from hf_devft.tasks.data import IGNORED


def label_features(counts: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A random projection (Johnson and Lindenstrauss 1984) of the square roots of each client's label frequencies.

    A language model's labels are its tokens. Distances between features are about the Hellinger distances (times √2)
    of the distributions.

    Args:
        counts: how often each token is a label, clients x vocabulary.
        size: numbers per client.

    Returns:
        Clients x size.
    """
    frequencies = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    projection = np.random.default_rng(seed).standard_normal((counts.shape[1], size)) / np.sqrt(size)
    return np.sqrt(frequencies) @ projection


def label_counts(dataset: Dataset, rows: Sequence[np.ndarray]) -> np.ndarray:
    """How often each token (or class) is a label of each client: clients x vocabulary.

    Args:
        dataset: with a column `labels`, -100 where there is none.
        rows: each client's.

    Raises:
        ValueError: there is no such column.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        raise ValueError(
            "the federated method needs the distribution of the clients' labels: pass a dataset of text, or with a "
            "column `labels`, or use another method."
        )
    labels = dataset.with_format("arrow")["labels"].combine_chunks()
    if isinstance(labels, pyarrow.ListArray):
        row_of = np.repeat(np.arange(len(labels)), np.diff(labels.offsets.to_numpy()))
        labels = labels.values
    else:
        row_of = np.arange(len(labels))  # one class a row
    tokens = labels.to_numpy(zero_copy_only=False)
    client_of = np.full(len(dataset), -1)  # nobody's: held out
    for client, own in enumerate(rows):
        client_of[own] = client
    kept = (tokens != IGNORED) & (client_of[row_of] >= 0)
    counts = np.zeros((len(rows), int(tokens.max()) + 1))
    np.add.at(counts, (client_of[row_of[kept]], tokens[kept]), 1)
    return counts
