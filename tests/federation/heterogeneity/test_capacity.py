"""Which submodel a client trains in a stage, by the layers that it can hold."""

import pytest

from hf_devft.federation.heterogeneity.capacity import Capacities


STAGES = [4, 8, 16]


@pytest.mark.parametrize(("beyond", "trained"), [("sit_out", [1, 2, None]), ("keep_last", [1, 2, 2])])
def test_a_client_trains_what_it_can_hold(beyond, trained):
    capacities = Capacities(3, [16, 8], STAGES, beyond)  # in turns: the third is as the first
    assert [capacities.trains(1, stage) for stage in (1, 2, 3)] == trained
    assert [capacities.trains(2, stage) for stage in (1, 2, 3)] == [1, 2, 3]


def test_without_limits_any_client_trains_every_stage():
    """Also one of another number than the clients here have: a participant is told the server's."""
    capacities = Capacities(1, None, STAGES, "sit_out")
    assert [capacities.trains(7, stage) for stage in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("limits", [None, [16]])
def test_a_limit_that_is_heard_of_later_counts_from_then_on(limits):
    capacities = Capacities(3, limits, STAGES, "sit_out")
    capacities.lower(1, 8, needed=2)
    assert [list(capacities.taking_part(stage)) for stage in (1, 2, 3)] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    capacities.lower(1, 12, needed=2)
    assert list(capacities.taking_part(3)) == [0, 2], "it can hold no more than it could"
    capacities.lower(2, 8, needed=2)
    assert list(capacities.taking_part(3)) == [0, 2], "a stage needs two"
