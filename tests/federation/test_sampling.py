from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.federation.sampling import (
    ClientSelection,
    Placement,
    client_seed,
    local_trainings,
    sample_clients,
)


@given(count=st.integers(1, 50), seed=st.integers(0, 2**31), round_index=st.integers(0, 1000), data=st.data())
def test_sampled_clients_are_distinct_and_repeatable(count, seed, round_index, data):
    chosen = data.draw(st.integers(1, count))
    attempt = data.draw(st.integers(0, 4))
    clients = sample_clients(range(count), chosen, seed, round_index, attempt)
    assert len(set(clients)) == chosen
    assert set(clients) <= set(range(count))
    assert clients == sample_clients(range(count), chosen, seed, round_index, attempt)


@given(seed=st.integers(0, 999), round_index=st.integers(0, 99))
def test_a_retried_round_asks_other_clients_while_there_are_any(seed, round_index):
    attempts = [sample_clients(range(7), 2, seed, round_index, attempt) for attempt in range(5)]
    assert len({client for clients in attempts[:3] for client in clients}) == 6
    assert all(len(set(clients)) == 2 for clients in attempts[3:])


def test_every_client_takes_part_sooner_or_later():
    assert {client for index in range(200) for client in sample_clients(range(20), 2, 0, index)} == set(range(20))


def test_seeds_differ_between_rounds_and_clients():
    seeds = {client_seed(0, round_index, client) for round_index in range(30) for client in range(30)}
    assert len(seeds) == 900


def test_chances_are_in_proportion_to_the_weights():
    counts = Counter(c for index in range(3000) for c in sample_clients([3, 5, 9], 1, 0, index, weights=[1, 2, 7]))
    assert [counts[client] / 3000 for client in (3, 5, 9)] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


@given(count=st.integers(1, 6), clients=st.lists(st.integers(0, 50), unique=True, max_size=8))
def test_processes_share_the_clients_or_each_batch(count, clients):
    parallel = [Placement("client_parallel", index, count) for index in range(count)]
    assert sorted(client for placement in parallel for client in placement.clients(clients)) == sorted(clients)
    assert all(placement.rows(clients) == clients for placement in parallel)
    together = [Placement("data_parallel", index, count) for index in range(count)]
    assert all(placement.clients(clients) == clients for placement in together)
    assert sorted(row for placement in together for row in placement.rows(clients)) == sorted(clients)


def test_every_client_drops_out_as_often_as_another():
    selection = ClientSelection()
    selection.begin_run(2, [1] * 20, 0.1, seed=3, resources=None)
    selection.begin_stage(range(20), range(0), None, 0.0)
    asked, lost = Counter(), Counter()
    for index in range(6000):
        sampled = selection.sampled(index)
        asked.update(sampled)
        lost.update(set(sampled) - set(selection.training(index)))
    assert [lost[client] / asked[client] for client in range(20)] == pytest.approx([0.1] * 20, abs=0.05)


class Some:
    """A plan in which clients drop out."""

    def training(self, round_index, attempt=0):
        return sample_clients(range(10), round_index % 4, 1, round_index, attempt)


def test_local_trainings_are_the_clients_that_train():
    alone = list(local_trainings(Some(), Placement(), range(5)))
    assert alone == [(index, client) for index in range(5) for client in Some().training(index)]
    shared = [local_trainings(Some(), Placement("client_parallel", index, 3), range(5)) for index in range(3)]
    assert sorted(turn for part in shared for turn in part) == sorted(alone)
