import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_devft.federation.batches import ClientBatches, FederatedBatchSampler, ShareCollator, client_batches
from hf_devft.federation.sampling import Placement


@given(size=st.integers(1, 30), batch=st.integers(1, 12), drop_last=st.booleans())
def test_a_pass_shows_every_row_once(size, batch, drop_last):
    rows = np.arange(100, 100 + size)
    in_a_pass = max(size // min(batch, size), 1) if drop_last else -(-size // min(batch, size))
    batches = list(itertools.islice(client_batches(rows, batch, drop_last, seed=1), in_a_pass))
    seen = [row for rows_ in batches for row in rows_]
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert all(len(rows_) == min(batch, size) for rows_ in batches)
    else:
        assert sorted(seen) == rows.tolist()


@given(size=st.integers(1, 40), batch=st.integers(1, 9), grouped=st.integers(1, 6), drop_last=st.booleans())
def test_rows_of_like_length_share_a_batch(size, batch, grouped, drop_last):
    """Over a round's batches the same rows are seen, and no batch has rows that are between another's in length."""
    lengths, rows = np.random.default_rng(size).integers(1, 50, 100 + size), np.arange(100, 100 + size)
    shuffled, by_length = (
        list(itertools.islice(client_batches(rows, batch, drop_last, 1, given, grouped), grouped))
        for given in (None, lengths)
    )
    if grouped * min(batch, size) <= size:
        assert sorted(itertools.chain(*by_length)) == sorted(itertools.chain(*shuffled))
        spans = sorted((lengths[each].min(), lengths[each].max()) for each in by_length)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


ROWS = [np.arange(index * 10, index * 10 + 7) for index in range(5)]


def test_a_clients_batches_do_not_depend_on_what_went_before():
    def batches(turns, **kwargs):
        return list(FederatedBatchSampler(ROWS, turns, 3, 4, False, 1, **kwargs))

    turns = [(0, 1), (0, 4), (1, 2), (1, 3)]
    assert len(batches(turns)) == 4 * 3
    assert batches(turns[2:]) == batches(turns)[2 * 3 :]


def test_shares_of_a_batch_make_up_the_batch():
    shares = [
        list(FederatedBatchSampler(ROWS, [(0, 1)], 4, 4, False, 1, Placement("data_parallel", index, 4)))
        for index in range(4)
    ]
    whole = list(FederatedBatchSampler(ROWS, [(0, 1)], 4, 4, False, 1))
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == list(map(sorted, whole))
    assert shares[3][1] == [], "seven rows in batches of four leave one process without a row"


def test_an_empty_share_has_no_labels():
    collate = ShareCollator(lambda rows: {"labels": torch.tensor(rows)}, [7, 7])
    assert collate([[1, 2]])["labels"].tolist() == [[1, 2]]
    assert collate([])["labels"].tolist() == [[-100, -100]]


class Rows(torch.utils.data.Dataset):
    """Rows 0 to 11, of which 5 cannot be read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5:
            raise OSError("unreadable")
        return index


def test_what_a_failed_client_left_over_is_passed_over():
    batches = ClientBatches(DataLoader(Rows(), batch_size=1), batches_per_client=3)
    assert next(batches.next_client()).item() == 0
    second = batches.next_client()
    assert next(second).item() == 3
    next(second)
    with pytest.raises(OSError, match="unreadable"):
        next(second)
    next(batches.next_client())  # fails after one batch; 7 and 8 are left over
    assert [batch.item() for batch in batches.next_client()] == [9, 10, 11]


def test_an_unreadable_row_that_is_left_over_does_no_harm():
    batches = ClientBatches(DataLoader(Rows(), batch_size=1), batches_per_client=3)
    batches.next_client()
    next(batches.next_client())
    assert next(batches.next_client()).item() == 6
