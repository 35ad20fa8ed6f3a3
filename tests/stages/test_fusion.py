import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.stages.fusion import FUSIONS, fuse


def test_differential_fusion_is_the_papers_formula():
    anchor, second, third = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([0.0, 12.0])
    expected = torch.tensor([1 + 0.1 * (2 - 1), 2 + 0.1 * (-2 + 10)])
    torch.testing.assert_close(fuse([anchor, second, third], "differential", 0.1), expected)


def test_ablations():
    members = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])]
    assert fuse(members, "mean").item() == pytest.approx(3)
    assert fuse(members, "sum").item() == pytest.approx(9)
    assert fuse(members, "anchor") is members[0]


@pytest.mark.parametrize("rule", sorted(set(FUSIONS) - {"sum"}))
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 9),
    beta=st.floats(-2, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=40, deadline=None)
def test_fusion_of_equal_layers_is_the_identity(rule, seed, size, beta, dtype):
    tensor = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    fused = fuse([tensor.clone() for _ in range(size)], rule, beta)
    assert fused.dtype == dtype
    assert torch.equal(fused, tensor)
