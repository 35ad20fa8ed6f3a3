from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.federation.heterogeneity.clock import Work
from hf_devft.federation.heterogeneity.resources import ClientResources, make_resources
from hf_devft.federation.selection import SELECTIONS, BySize, ClientSelection, ResourceAware


DAY = 86_400.0


def begun(selection, clients=10, per_round=3, dropout_rate=0.0, resources=None, rounds=20, candidates=None, work=None):
    selection.begin_run(per_round, [index + 1 for index in range(clients)], dropout_rate, 0, resources)
    selection.begin_stage(
        candidates or range(clients), range(rounds), work or Work([1.0] * clients, [1.0] * clients), 0.0
    )
    return selection


def test_clients_drop_out_at_the_given_rate():
    selection = begun(ClientSelection(), clients=100, per_round=10, dropout_rate=0.3)
    staying = [len(selection.training(index)) for index in range(200)]
    assert 6.6 < sum(staying) / 200 < 7.4
    assert set(selection.training(3)) < set(selection.sampled(3))
    all_stay = begun(ClientSelection(), clients=100, per_round=10)
    assert all_stay.training(3) == all_stay.sampled(3) == selection.sampled(3)


def test_a_clock_does_not_change_who_takes_part():
    timed, plain = begun(ClientSelection(), resources=make_resources(10, 0)), begun(ClientSelection())
    assert [timed.sampled(index) for index in range(20)] == [plain.sampled(index) for index in range(20)]
    assert min(timed.seconds(index) for index in range(20)) > 0 == plain.seconds(0)


def test_larger_clients_come_more_often():
    selection = begun(BySize(), clients=4, per_round=1, rounds=1)
    counts = Counter(client for index in range(2000) for client in selection.sampled(index))
    assert [counts[client] / 2000 for client in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("attempt", [0, 1])
def test_only_candidates_are_asked(name, attempt):
    selection = begun(SELECTIONS[name](), resources=make_resources(10, 0), candidates=[1, 4, 5, 8])
    for index in range(20):
        sampled = selection.sampled(index, attempt)
        assert 1 <= len(set(sampled)) <= 3
        assert set(sampled) <= {1, 4, 5, 8}
        assert set(selection.training(index, attempt)) <= set(sampled)
        assert sampled == sorted(sampled), "processes share them in this order"


@given(seed=st.integers(0, 200), wait_for=st.floats(0.1, 1.0), staleness=st.integers(0, 4))
def test_every_late_update_arrives_once_and_not_too_late(seed, wait_for, staleness):
    selection = begun(
        ResourceAware(wait_for, staleness), resources=make_resources(10, seed), work=Work([1e13] * 10, [1e6] * 10)
    )
    arrivals = Counter()
    for index in range(20):
        late = selection.late(index)
        assert set(late) <= set(selection.training(index))
        assert all(index < arrives <= index + staleness for arrives in late.values())
        arrivals.update((client, began) for client, began in selection.arrivals(index).items())
        assert selection.seconds(index) >= 0
    assert arrivals == Counter((client, index) for index in range(20) for client in selection.late(index))


def test_nobody_is_asked_while_at_work_or_away():
    there = ((0.0, DAY / 2),)
    resources = [ClientResources(1.0, 1.0, there if client < 5 else ((DAY / 2, DAY),)) for client in range(10)]
    selection = begun(
        ResourceAware(), resources=resources, work=Work([5000.0 * (c + 1) for c in range(10)], [0.0] * 10)
    )
    clock, busy = 0.0, dict.fromkeys(range(10), 0.0)
    for index in range(20):
        sampled, end = selection.sampled(index), clock + selection.seconds(index)
        halves = {client < 5 for client in sampled}
        assert len(halves) == 1, "the two halves are never there together"
        for client in selection.training(index):
            assert busy[client] <= end
            busy[client] = max(clock, busy[client]) + 5000.0 * (client + 1) if client in selection.late(index) else 0.0
        clock = end


def test_clients_that_will_soon_be_gone_come_first():
    resources = [ClientResources(1.0, 1.0, ((0.0, 150.0 if client in (2, 7) else DAY),)) for client in range(10)]
    selection = begun(ResourceAware(), per_round=2, resources=resources, work=Work([100.0] * 10, [0.0] * 10))
    assert selection.sampled(0) == [2, 7]


def test_a_client_that_leaves_before_it_is_done_is_not_heard_of():
    resources = [ClientResources(1.0, 1.0, ((0.0, 50.0 if client == 0 else DAY),)) for client in range(3)]
    selection = begun(ResourceAware(), clients=3, resources=resources, work=Work([100.0] * 3, [0.0] * 3), rounds=1)
    assert selection.sampled(0) == [0, 1, 2]
    assert selection.training(0) == [1, 2]


@pytest.mark.parametrize("options", [{"wait_for": 0}, {"wait_for": 1.5}, {"max_staleness": -1}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match="wait_for"):
        ResourceAware(**options)


def test_a_round_that_is_tried_again_asks_others_whoever_was_asked_first():
    resources, work = make_resources(20, 3), Work([1e13] * 20, [1e6] * 20)
    selection = begun(ResourceAware(), clients=20, per_round=4, resources=resources, work=work)
    for index in range(10):
        first, second = (set(selection.sampled(index, attempt)) for attempt in (0, 1))
        assert len(second) == 4
        assert not first & second
