import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.federation.sampling import FederatedBatchSampler, client_batches, client_seed, sample_clients


@given(count=st.integers(1, 50), seed=st.integers(0, 2**31), round_index=st.integers(0, 1000), data=st.data())
def test_sampled_clients_are_distinct_and_repeatable(count, seed, round_index, data):
    chosen = data.draw(st.integers(1, count))
    clients = sample_clients(count, chosen, seed, round_index)
    assert len(set(clients)) == chosen
    assert set(clients) <= set(range(count))
    assert clients == sample_clients(count, chosen, seed, round_index)


def test_every_client_takes_part_sooner_or_later():
    assert {client for index in range(200) for client in sample_clients(20, 2, 0, index)} == set(range(20))


def test_seeds_differ_between_rounds_and_clients():
    seeds = {client_seed(0, round_index, client) for round_index in range(30) for client in range(30)}
    assert len(seeds) == 900


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


def test_a_resumed_sampler_goes_on_where_the_whole_one_is():
    rows = [np.arange(index * 10, index * 10 + 7) for index in range(5)]

    def batches(first_round):
        return list(FederatedBatchSampler(rows, 2, 3, 4, False, 0, 1, first_round, 6))

    assert len(batches(0)) == 6 * 2 * 3
    assert batches(4) == batches(0)[4 * 2 * 3 :]
