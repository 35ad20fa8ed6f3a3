"""How long is waited before Flower is asked again."""

from hypothesis import given
from hypothesis import strategies as st

from hf_devft.network.polling import LONGEST, SHORTEST, pause


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_who_has_waited_longer_asks_more_rarely(one, other):
    assert SHORTEST <= pause(min(one, other)) <= pause(max(one, other)) <= LONGEST


def test_an_answer_is_noticed_within_a_fiftieth_of_the_time_that_it_took():
    assert pause(0.1) == SHORTEST
    assert pause(10.0) == 0.2
    assert pause(3600.0) == LONGEST
