import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.federation.methods import METHODS, FedIT


def aggregate(method, start, clients):
    method.begin_round(start)
    for adapter, examples in clients:
        method.receive(adapter, examples)
    method.merge(lambda tensor: None)
    return method.end_round()


def test_fedit_is_the_mean_weighted_by_examples():
    clients = [(torch.tensor([1.0, 2.0]), 1), (torch.tensor([4.0, 8.0]), 2)]
    torch.testing.assert_close(aggregate(FedIT(), torch.zeros(2), clients), torch.tensor([3.0, 6.0]))


@given(seed=st.integers(0, 999), examples=st.lists(st.integers(1, 10_000), min_size=1, max_size=8))
def test_fedit_of_equal_adapters_is_that_adapter_and_order_does_not_matter(seed, examples):
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(5, generator=generator)
    assert torch.equal(aggregate(FedIT(), same, [(same, count) for count in examples]), same)
    clients = [(torch.randn(5, generator=generator), count) for count in examples]
    assert torch.equal(aggregate(FedIT(), same, clients), aggregate(FedIT(), same, clients[::-1]))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_forgets_the_round_before(name):
    method = METHODS[name]()
    first = aggregate(method, torch.zeros(3), [(torch.ones(3), 5)])
    aggregate(method, torch.zeros(3), [(torch.full((3,), 9.0), 7)])
    assert torch.equal(aggregate(method, torch.zeros(3), [(torch.ones(3), 5)]), first)
