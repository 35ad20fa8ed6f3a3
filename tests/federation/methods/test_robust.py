"""Robust rules: a few bad updates do not matter, and without them a rule is near the mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.federation.methods import AGGREGATION_RULES, make_methods


RULES = {
    "median": {},
    "trimmed_mean": {"trimmed_fraction": 0.3},
    "geometric_median": {},
    "krum": {"byzantine": 2},
    "multi_krum": {"byzantine": 2},
    "norm_clipping": {},
}
BAD = {
    "scaled": lambda honest: 1e6 * honest,
    "huge": lambda honest: torch.full_like(honest, 1e37),
    "sign flipped": lambda honest: -10 * honest,
    "noise": lambda honest: 50 * torch.randn(honest.shape, generator=torch.Generator().manual_seed(3)).double(),
}


def a_little_is_enough(honest: torch.Tensor) -> torch.Tensor:
    """What two bad clients agree on: each value a little beside the honest ones' mean (Baruch et al. 2019)."""
    return honest.mean(dim=0) - 1.5 * honest.std(dim=0)


def honest_updates(count: int, seed: int, size: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) + 0.3 * torch.randn(count, size, generator=generator)).double()


def make(name: str, options: dict | None = None):
    return make_methods(f"fedit+{name}", RULES[name] if options is None else options).rule


@given(seed=st.integers(0, 99))
@settings(max_examples=10)
@pytest.mark.parametrize("attack", [*BAD, "a little is enough"])
@pytest.mark.parametrize("name", RULES)
def test_two_bad_clients_of_ten_do_little(name, attack, seed):
    updates = honest_updates(10, seed)
    mean = updates[2:].mean(dim=0)
    if attack in BAD:
        updates[:2] = torch.stack([BAD[attack](update) for update in updates[:2]])
    else:
        updates[:2] = a_little_is_enough(updates[2:])
    error = (make(name).combine(updates, torch.ones(10).double()) - mean).norm() / mean.norm()
    if attack not in BAD:  # well within the others, which no rule sees; one round of it does little
        assert error < (0.4 if name == "krum" else 0.2)
    # Clipping keeps two updates of the others' size, which may point against them.
    assert error < (0.6 if name == "norm_clipping" else 0.45)
    if attack in ("scaled", "huge"):
        assert (updates.mean(dim=0) - mean).norm() / mean.norm() > 1e3, "which moves the mean by a lot"


@given(seed=st.integers(0, 99), count=st.integers(7, 12))
@settings(max_examples=10)
@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_is_none_and_equal_updates_are_themselves(name, seed, count):
    updates, weights = honest_updates(count, seed), torch.arange(1.0, count + 1).double()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        make(name).combine(updates[order], weights[order]), make(name).combine(updates, weights), rtol=1e-6, atol=1e-9
    )
    same = updates[:1].expand(count, -1)
    torch.testing.assert_close(make(name).combine(same, weights), updates[0])


def test_by_hand():
    updates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 3.0], [100.0, -100.0]]).double()
    weights = torch.tensor([1.0, 1, 1, 1, 1]).double()
    assert make("median").combine(updates, weights).tolist() == [2.0, 1.0]
    assert make("median").combine(updates[:4], weights[:4]).tolist() == [1.5, 1.5]
    assert make("trimmed_mean", {}).combine(updates, weights).tolist() == [2.0, 1.0]
    # Of five with f = 1, the two nearest others count: of (1, 0) these are (0, 1) and (2, 2).
    scores = make("krum", {"byzantine": 1}).scores(updates)[:4]
    torch.testing.assert_close(scores, torch.tensor([2.0 + 5, 2 + 5, 2 + 5, 2 + 13]).double())
    clipped = make("norm_clipping", {"max_update_norm": 1.0}).combine(updates[:2] * 3, torch.tensor([3.0, 1]).double())
    torch.testing.assert_close(clipped, torch.tensor([0.25, 0.75]).double())


def test_the_geometric_median_has_the_smallest_sum_of_distances():
    updates, weights = honest_updates(9, 0, size=4), torch.arange(1.0, 10).double()
    point = make("geometric_median").combine(updates, weights)

    def total(at: torch.Tensor) -> float:
        return (weights * (updates - at).norm(dim=1)).sum().item()

    for seed in range(20):
        step = 1e-3 * torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
        assert total(point) < total(point + step)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("trimmed_mean", {"trimmed_fraction": 0.5}, "below 0.5"),
        ("geometric_median", {"weiszfeld_steps": 0}, "1 or more"),
        ("krum", {"byzantine": -1}, "0 or more"),
        ("norm_clipping", {"max_update_norm": 0}, "above 0"),
        ("median", {"byzantine": 1}, "does not take"),
    ],
)
def test_options_are_checked(name, options, says):
    with pytest.raises(ValueError, match=says):
        make(name, options)


def test_how_many_updates_a_rule_needs():
    needs = {name: make(name, {}).needs for name in AGGREGATION_RULES}
    assert needs.pop("krum") == needs.pop("multi_krum") == 5
    assert set(needs.values()) == {3}
    assert make("krum", {"byzantine": 3}).needs == 9
    assert make("norm_clipping", {"max_update_norm": 1.0}).needs == 1
