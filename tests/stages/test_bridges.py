import itertools

import pytest
import torch
from architectures import tiny_model
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.bridges import Bridge, best_blocks
from hf_devft.stages.submodel import build_submodel, layers_of


INPUT = torch.tensor([[3, 9, 27, 5, 1]])


@st.composite
def errors_and_capacity(draw):
    depth = draw(st.integers(1, 8))
    values = draw(st.lists(st.floats(0, 1), min_size=depth * depth, max_size=depth * depth))
    errors = torch.tensor(values, dtype=torch.float64).view(depth, depth)
    return errors, draw(st.integers(1, depth))


@given(errors_and_capacity())
def test_blocks_are_those_of_least_error_in_all(case):
    errors, capacity = case
    depth = len(errors)

    def total(groups):
        return sum(errors[group[0], group[-1]].item() for group in groups if len(group) > 1)

    found = best_blocks(errors, capacity)
    assert [layer for group in found for layer in group] == list(range(depth))
    assert len(found) == capacity
    cuts = itertools.combinations(range(1, depth), capacity - 1)
    all_groups = ([list(range(*span)) for span in itertools.pairwise([0, *cut, depth])] for cut in cuts)
    assert total(found) == pytest.approx(min(map(total, all_groups)))


def test_a_new_bridge_changes_nothing():
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(Bridge(8)(hidden), hidden)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_a_bridge_stands_behind_the_layer_that_others_follow(architecture):
    """It is crossed, whatever the layers return, and reads vectors by their root mean square."""
    base = tiny_model(architecture).eval()
    stack = find_layer_stack(base)
    groups = [[0, 1], *([layer] for layer in range(2, len(stack)))]
    submodel = build_submodel(base, stack, groups, "bridge").eval()
    first, *others = layers_of(submodel, stack, groups)
    assert not any(hasattr(layer, "bridge") for layer in others)
    assert torch.equal(submodel(INPUT).logits, build_submodel(base, stack, groups, "anchor").eval()(INPUT).logits)
    seen = []
    others[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    before = submodel(INPUT, use_cache=False).logits
    first.bridge.weight.fill_diagonal_(2)
    first.bridge.bias.fill_(0.5)
    after = submodel(INPUT, use_cache=False).logits
    assert not torch.equal(before, after)
    plain, bridged = seen
    normed = plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(bridged, plain + 2 * normed + 0.5)


def test_groups_that_cannot_be_bridged():
    base = tiny_llama()
    with pytest.raises(ValueError, match=r"layers \[0, 2\] share a group"):
        build_submodel(base, find_layer_stack(base), [[0, 2], [1], [3]], "bridge")
