"""DP-SGD within a client: rows are clipped one by one, and drawn by chance."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_devft.federation.privacy import RecordPrivacy, RowsApart
from hf_devft.federation.privacy.noise import gaussian


def steps(parameters, noise=0.0, norm=1.0, batch_size=4, secret=7, turn=(0, 0), examples=1000):
    privacy = RecordPrivacy(noise, norm, batch_size, secret, examples=[examples] * (turn[1] + 1))
    return privacy.steps(parameters, *turn)


def take(gradients: list[list[torch.Tensor]], **rule) -> list[torch.Tensor]:
    """What the optimiser is given for rows of these gradients."""
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4))]
    private = steps(parameters, **rule)
    for row in gradients:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        private.add_row()
        assert all(parameter.grad is None for parameter in parameters)
    private.end_step()
    return [parameter.grad for parameter in parameters]


def rows(count: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [[scale * torch.randn(shape, generator=generator) for shape in ((3, 2), (4,))] for _ in range(count)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@given(norm=st.floats(0.01, 10.0), scale=st.floats(0.01, 100.0), count=st.integers(0, 6))
@settings(max_examples=50)
def test_it_is_the_mean_of_the_rows_clipped_gradients(norm, scale, count):
    gradients = rows(count, scale)
    clipped = [flat(row) * min(1.0, norm / flat(row).norm().item()) for row in gradients]
    expected = sum(clipped, torch.zeros(10)) / 5
    found = flat(take(gradients, norm=norm, batch_size=5))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@given(norm=st.floats(0.01, 10.0), scale=st.floats(0.01, 1e6), count=st.integers(0, 6))
@settings(max_examples=50)
def test_one_row_more_changes_the_sum_by_no_more_than_the_norm(norm, scale, count):
    one, more = (flat(take(rows(7, scale)[:number], norm=norm, batch_size=1)) for number in (count, count + 1))
    assert (more - one).norm().item() <= norm * 1.0001 + 1e-5


def test_a_client_of_fewer_rows_than_a_batch_divides_by_those_that_it_has():
    found = flat(take(rows(3), norm=1e6, batch_size=16, examples=3))
    assert torch.allclose(found, sum(map(flat, rows(3))) / 3)


def test_a_row_that_is_not_finite_counts_as_nothing():
    broken = [[torch.full((3, 2), float("nan")), torch.zeros(4)], [torch.full((3, 2), float("inf")), torch.zeros(4)]]
    assert torch.equal(flat(take([*rows(2), *broken])), flat(take(rows(2))))


def test_the_noise_is_as_large_as_it_should_be():
    parameters = [nn.Parameter(torch.zeros(200, 100))]
    private = steps(parameters, noise=2.0, norm=0.5, batch_size=4)
    private.end_step()
    assert parameters[0].grad.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.02)


@pytest.mark.parametrize("other", [{"turn": (1, 0)}, {"turn": (0, 1)}, {"secret": 8}, {"noise": 2.0}, {"norm": 3.0}])
def test_noise_cannot_be_taken_away_by_another_run_with_the_same_secret(other):
    """Gradients are small enough not to be clipped: only the noise may differ."""
    rule = {"noise": 1.0, "norm": 2.0}
    gradients = rows(3, scale=1e-3)
    base, again, changed = take(gradients, **rule), take(gradients, **rule), take(gradients, **rule | other)
    assert torch.equal(flat(base), flat(again))
    mean = flat(take(gradients, norm=2.0))
    units = [
        (flat(found) - mean) / (settled["noise"] * settled["norm"])
        for found, settled in ((base, rule), (changed, rule | other))
    ]
    assert not torch.allclose(*units, rtol=1e-3)


def test_each_step_and_each_sum_has_noise_of_its_own():
    parameters = [nn.Parameter(torch.zeros(50))]
    private, drawn = steps(parameters, noise=1.0), []
    for _ in range(2):
        private.end_step()
        drawn.append(parameters[0].grad)
    assert not torch.allclose(*drawn)
    one, other = (gaussian(50, 1, "x", torch.tensor([value])) for value in (1.0, 1.0 + 1e-6))
    assert not torch.allclose(one, other)


def test_rows_are_drawn_one_by_one():
    all_rows, privacy = (
        np.arange(1000, 1100),
        RecordPrivacy(1.0, 1.0, batch_size=10, secret=2**100 + 3, examples=[100]),
    )
    batches = privacy.batches(all_rows, 4, 2)
    drawn = list(itertools.islice(batches, 500))
    sizes = [len(batch) for batch in drawn]
    assert np.mean(sizes) == pytest.approx(10, abs=0.5)
    assert np.std(sizes) == pytest.approx(3, abs=0.4)  # √(n q (1 − q))
    assert {row for batch in drawn for row in batch} == set(all_rows.tolist())
    assert next(privacy.batches(all_rows, 4, 2)) == drawn[0] != next(privacy.batches(all_rows, 5, 2))
    assert all(len(batch) == 4 for batch in itertools.islice(privacy.batches(all_rows[:4], 0, 0), 5))


def test_rows_are_collated_one_by_one():
    apart = RowsApart(lambda some: {"input_ids": torch.tensor(some)})
    assert [row["input_ids"].tolist() for row in apart([[1, 2], [3]])] == [[[1, 2]], [[3]]]
    assert apart([]) == []
