"""ε against values that others have published, and what follows from it."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.federation.privacy import ClientAccountant, RecordAccountant, affordable, find_noise_multiplier


def normal(x: float) -> float:
    """Φ."""
    return math.erfc(-x / math.sqrt(2)) / 2


def test_the_subsampled_gaussian_of_koskela_et_al():
    """arXiv 1906.03049, the example of their accountant: q = 0.01, σ = 4, δ(ε = 1) = 4.243484e-6. It says 1,000
    rounds; its numbers are those of 10,000."""
    accountant = ClientAccountant(noise_multiplier=4.0, clients_per_round=10, delta=4.243484012034273e-6)
    assert accountant.epsilon([1000] * 10_000) == pytest.approx(1.0, abs=0.02)


def test_below_the_bound_of_abadi_et_al():
    """arXiv 1607.00133, §3.2: q = 0.01, σ = 4, δ = 1e-5, 10,000 steps cost 1.26 by moments (no tight bound)."""
    assert 0.9 < ClientAccountant(noise_multiplier=4.0, clients_per_round=10).epsilon([1000] * 10_000) < 1.26


def test_below_the_bound_of_mcmahan_et_al():
    """arXiv 1710.06963, Table 1: 5,000 of 763,430 users, z = 1, δ = 1e-9, 4,120 rounds cost 4.634 by moments."""
    accountant = ClientAccountant(noise_multiplier=1.0, clients_per_round=5000, delta=1e-9)
    assert 3.3 < accountant.epsilon([763_430] * 4120) < 4.634


@given(noise=st.floats(0.7, 5.0), rounds=st.integers(1, 5))
@settings(max_examples=20)
def test_where_all_take_part_it_is_the_gaussian_mechanism(noise, rounds):
    """Balle and Wang 2018, arXiv 1805.06530, Theorem 8: δ(ε) in closed form, of noise divided by √rounds."""
    epsilon = ClientAccountant(noise, clients_per_round=30).epsilon([30] * rounds)
    sigma = noise / math.sqrt(rounds)
    delta = normal(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal(-0.5 / sigma - epsilon * sigma)
    assert delta == pytest.approx(1e-5, rel=0.05)


@given(
    noise=st.floats(0.6, 3.0),
    clients=st.integers(1, 20),
    rounds=st.integers(1, 10),
    sampling=st.sampled_from(["poisson", "fixed_size"]),
)
@settings(max_examples=8)
def test_more_rounds_and_fewer_others_cost_more(noise, clients, rounds, sampling):
    accountant = ClientAccountant(noise, clients, sampling)
    spent = accountant.epsilon([100] * rounds)
    assert accountant.epsilon([100] * (rounds + 1)) > spent > 0
    assert accountant.epsilon([200] * rounds) < spent
    assert ClientAccountant(noise * 1.5, clients, sampling).epsilon([100] * rounds) < spent


def test_nothing_costs_nothing_and_the_order_of_rounds_is_none():
    accountant = ClientAccountant(1.0, 5)
    assert accountant.epsilon([]) == 0
    assert accountant.epsilon([50, 100, 50]) == accountant.epsilon([100, 50, 50])


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
def test_the_noise_is_the_least_that_a_budget_allows(sampling):
    populations = [1000] * 20 + [500] * 10
    make = partial(ClientAccountant, clients_per_round=20, sampling=sampling)
    noise = find_noise_multiplier(8.0, populations, make)
    assert ClientAccountant(noise, 20, sampling).epsilon(populations) <= 8.0
    assert ClientAccountant(0.99 * noise, 20, sampling).epsilon(populations) > 8.0


def test_a_budget_lasts_for_so_many_rounds():
    accountant, populations = ClientAccountant(0.8, 20), [400] * 40
    count = affordable(accountant, populations, 4.0)
    assert accountant.epsilon(populations[:count]) <= 4.0 < accountant.epsilon(populations[: count + 1])
    assert affordable(accountant, populations, 1e9) == 40
    assert affordable(accountant, populations, 1e-9) == 0


@pytest.mark.parametrize(("noise", "epochs", "by_moments"), [(1.3, 15, 1.19), (1.1, 60, 3.0), (0.7, 45, 7.11)])
def test_dp_sgd_is_below_the_bounds_of_tensorflow_privacy(noise, epochs, by_moments):
    """Its tutorial on MNIST: 60,000 rows, batches of 250, δ = 1e-5."""
    accountant = RecordAccountant(noise, examples=(60_000,), batch_size=250, steps=240)
    assert 0.7 * by_moments < accountant.epsilon([[0]] * epochs) < by_moments


def test_a_row_pays_for_its_own_clients_steps_and_the_dearest_counts():
    accountant = RecordAccountant(1.0, examples=(100, 1000, 1000), batch_size=10, steps=5)
    small, large = accountant.epsilon([[0, 1], [0, 2]]), accountant.epsilon([[1], [2]])
    assert small == accountant.epsilon([[0]] * 2) > large == accountant.epsilon([[1]])
    assert accountant.epsilon([]) == 0
