import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds_of import begin, layout, random_adapter

from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import METHODS
from hf_devft.federation.privacy import ClientPrivacy
from hf_devft.federation.privacy.mechanism import split_noise


LAYOUT = layout()


def private_round(privacy: ClientPrivacy, updates: list[torch.Tensor], index: int = 0, method: str = "fedit"):
    """What clients' updates move a global adapter of zeros by."""
    averaging, start = METHODS[method](), torch.zeros(sum(LAYOUT.sizes))
    begin(averaging, LAYOUT, [1] * len(updates), start)
    averaging.begin_round(index, start, range(len(updates)))
    privacy.begin_round()
    for client, update in enumerate(updates):
        sent = averaging.payload(client, update)
        averaging.receive(client, start, privacy.clip(averaging.wide(sent)))
    privacy.end_round(averaging, index)
    return averaging.end_round()


def mechanism(noise=1e-12, norm=1.0, expected=4, secret=1, memory=None) -> ClientPrivacy:
    return ClientPrivacy(noise, norm, expected, secret, memory or Memory())


@given(scale=st.floats(1e-3, 1e6), bound=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
def test_one_client_moves_the_sum_by_the_norm_at_most(scale, bound, seed):
    others = [random_adapter(LAYOUT, seed + index) for index in range(3)]
    privacy = mechanism(noise=1e-15, norm=bound)
    without = private_round(privacy, others)
    moved = private_round(privacy, [*others, scale * random_adapter(LAYOUT, seed + 9)]) - without
    assert moved.norm() * 4 <= bound * (1 + 1e-4)


def test_within_the_norm_it_is_the_sum_by_the_expected_number():
    updates = [0.01 * random_adapter(LAYOUT, index) for index in range(3)]
    torch.testing.assert_close(private_round(mechanism(expected=5), updates), sum(updates) / 5)
    assert private_round(mechanism(), []).abs().max() < 1e-6, "nobody was drawn: nothing but noise"


def test_the_noise_has_its_size_and_only_what_travels_has_some():
    drawn = [private_round(mechanism(noise=2.0, norm=3.0), [], index, "ffa_lora") for index in range(60)]
    trained = METHODS["ffa_lora"]()
    begin(trained, LAYOUT, [1], torch.zeros(sum(LAYOUT.sizes)))
    noise = torch.stack([LAYOUT.pick(each, trained.sends(0)) for each in drawn])
    assert noise.std().item() == pytest.approx(2.0 * 3.0 / 4, rel=0.1)
    assert noise.mean().abs() < 0.1
    assert all(each.count_nonzero() == noise.shape[1] for each in drawn)


def test_the_noise_is_the_same_for_the_same_round_and_secret_alone():
    updates = [random_adapter(LAYOUT, 1)]
    first = private_round(mechanism(noise=1.0), updates)
    assert torch.equal(private_round(mechanism(noise=1.0), updates), first)
    other_answers = private_round(mechanism(noise=1.0), [random_adapter(LAYOUT, 2)])
    clipped = [each / each.norm() for each in (random_adapter(LAYOUT, 2), random_adapter(LAYOUT, 1))]
    assert (other_answers - first - (clipped[0] - clipped[1]) / 4).norm() > 0.1, "the noise must not cancel out"
    for other in (private_round(mechanism(noise=1.0), updates, 1), private_round(mechanism(1.0, secret=2), updates)):
        assert (other - first).norm() > 0.1


@given(order=st.permutations(range(7)))
def test_the_noise_does_not_depend_on_the_order_of_the_sum(order):
    """As which process adds which clients up does."""
    updates = [random_adapter(LAYOUT, index) for index in range(7)]
    first = private_round(mechanism(noise=1.0), updates)
    assert torch.equal(private_round(mechanism(noise=1.0), [updates[index] for index in order]), first)


def test_an_adaptive_norm_finds_the_median_of_the_updates_norms():
    memory, scales = Memory(), torch.linspace(0.5, 8.0, 40)
    updates = [scale * each / each.norm() for scale in scales for each in [random_adapter(LAYOUT, int(scale * 100))]]
    privacy = ClientPrivacy(0.5, "adaptive", 40, 1, memory)
    for index in range(40):
        private_round(privacy, updates, index)
        memory.commit()
    assert privacy.clipping_norm == pytest.approx(scales.median().item(), rel=0.15)


@given(noise=st.floats(0.1, 5.0), clients=st.integers(60, 1000))
def test_both_noises_together_cost_what_one_would(noise, clients):
    """Of Gaussian mechanisms 1/z² add up; the count of those within C, of b − ½, has a sensitivity of ½."""
    updates, count = split_noise(noise, clients)
    assert updates > noise
    assert updates**-2 + (2 * count) ** -2 == pytest.approx(noise**-2)
    assert math.isfinite(updates)


def test_too_few_clients_to_adapt_to():
    with pytest.raises(ValueError, match=r"clients_per_round=4 and 1\. Raise the one, or set a number"):
        ClientPrivacy(1.0, "adaptive", 4, 1, Memory())
