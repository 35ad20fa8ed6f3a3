"""DP-SGD within a client: rows are clipped one by one, and drawn by chance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_devft.federation.privacy import RecordPrivacy


START = torch.zeros(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 1))


def step(net: nn.Module, rows: torch.Tensor, noise: float, norm: float, batch_size: int, round_index: int = 0) -> list:
    """The gradients that the optimiser is given for a batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    privacy = RecordPrivacy(noise, norm, batch_size, secret=7)
    net.zero_grad()
    with privacy.steps(net, optimizer, START, round_index, client=0) as private:
        net(rows).square().sum().backward()
        private.make_private()
        return [parameter.grad.clone() for parameter in net.parameters()]


@given(norm=st.floats(0.01, 10.0), scale=st.floats(0.1, 100.0), count=st.integers(1, 6))
@settings(max_examples=20)
def test_it_is_the_mean_of_the_rows_clipped_gradients(norm, scale, count):
    net, rows = model(), scale * torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(count))
    expected = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for row in rows:
        gradients = torch.autograd.grad(net(row[None]).square().sum(), list(net.parameters()))
        total = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for place, gradient in zip(expected, gradients, strict=True):
            place += gradient * min(1.0, norm / (total.item() + 1e-6)) / 5
    found = step(net, rows, noise=0.0, norm=norm, batch_size=5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_the_noise_is_as_large_as_it_should_be_and_another_for_another_round():
    torch.manual_seed(0)
    net, rows = nn.Sequential(nn.Linear(200, 100, bias=False)), torch.zeros(3, 2, 200)
    (noise,), (other,), (again,) = (step(net, rows, 2.0, 0.5, 4, round_index=index) for index in (0, 1, 0))
    assert noise.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.02)
    assert torch.equal(noise, again)
    assert not torch.equal(noise, other)


def test_nothing_is_left_on_the_model():
    net = model()
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    step(net, torch.ones(2, 2, 4), 1.0, 1.0, 2)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert not any(hasattr(parameter, "grad_sample") for parameter in net.parameters())


class Flat(nn.Module):
    """Gives its layer tokens in place of rows, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.bare = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return nn.functional.linear(self.layer(x), self.bare.weight)


def test_a_weight_that_is_used_beside_its_module_is_refused():
    with pytest.raises(ValueError, match="cannot tell the gradients of this model's rows apart"):
        step(Flat(), torch.ones(2, 3, 4), 1.0, 1.0, 2)


def test_rows_are_drawn_one_by_one():
    rows, privacy = np.arange(1000, 1100), RecordPrivacy(1.0, 1.0, batch_size=10, secret=3)
    batches = privacy.batches(rows, 4, 2)
    drawn = [next(batches) for _ in range(500)]
    sizes = [len(batch) for batch in drawn]
    assert np.mean(sizes) == pytest.approx(10, abs=0.5)
    assert np.std(sizes) == pytest.approx(3, abs=0.4)  # √(n q (1 − q))
    assert {row for batch in drawn for row in batch} == set(rows.tolist())
    assert next(privacy.batches(rows, 4, 2)) == drawn[0] != next(privacy.batches(rows, 5, 2))
    assert all(len(batch) == 4 for batch, _ in zip(privacy.batches(rows[:4], 0, 0), range(5), strict=False))
