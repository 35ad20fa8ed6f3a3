from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.federation.privacy import PoissonSampling


def selection(clients: int, per_round: int, seed: int) -> PoissonSampling:
    drawn = PoissonSampling()
    drawn.begin_run(per_round, [1] * clients, 0.0, seed, None)
    drawn.begin_stage(range(clients), range(400), None, 0.0)
    return drawn


@given(clients=st.integers(5, 60), seed=st.integers(0, 2**128))
@settings(max_examples=20)
def test_each_takes_part_with_the_same_chance_by_itself(clients, seed):
    drawn = selection(clients, 5, seed)
    rounds = [drawn.sampled(index) for index in range(400)]
    assert rounds == [selection(clients, 5, seed).sampled(index) for index in range(400)]
    assert abs(sum(map(len, rounds)) / 400 - 5) < 0.7
    counts = [sum(client in each for each in rounds) for client in range(clients)]
    expected = 400 * 5 / clients
    assert max(abs(count - expected) for count in counts) <= 5 * expected**0.5 + 1
    if clients > 5:
        assert len({len(each) for each in rounds}) > 2, "how many take part is left to chance, too"
