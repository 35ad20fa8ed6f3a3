import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.grouping import GROUPINGS, GroupingTask, group_layers, layer_similarity


@st.composite
def grouping_tasks(draw):
    depth = draw(st.integers(1, 24))
    num_kinds = draw(st.integers(1, min(3, depth)))
    kinds = list(range(num_kinds)) + draw(
        st.lists(st.integers(0, num_kinds - 1), min_size=depth - num_kinds, max_size=depth - num_kinds)
    )
    capacity = draw(st.integers(num_kinds, depth))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(depth, draw(st.sampled_from([1, 2, 50])), generator=generator)
    if draw(st.booleans()):
        vectors = vectors[torch.randint(depth, (depth,), generator=generator)]  # equal layers
    similarity = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    importance = torch.rand(depth, generator=generator).tolist()
    return GroupingTask(
        kinds, capacity, seed, lambda: similarity, lambda kept: -sum(importance[layer] for layer in kept)
    )


def test_a_prefix_keeps_the_first_layers():
    assert group_layers(GroupingTask(["a"] * 6, 3), "prefix") == [[0], [1], [2, 3, 4, 5]]


@pytest.mark.parametrize("rule", GROUPINGS)
@given(task=grouping_tasks())
@settings(max_examples=60, deadline=None)
def test_groups_partition_the_layers(rule, task):
    groups = group_layers(task, rule)
    assert len(groups) == task.capacity
    assert sorted(layer for group in groups for layer in group) == list(range(len(task.kinds)))
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert all(len({task.kinds[layer] for layer in group}) == 1 for group in groups)
    assert group_layers(task, rule) == groups, "same seed, same groups"


def test_deconfliction_finds_the_blocks_of_a_similarity():
    blocks = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])
    similarity = torch.where(blocks[:, None] == blocks, 0.9, 0.05)
    groups = group_layers(GroupingTask([0] * 8, 3, similarity=lambda: similarity), "deconfliction")
    assert groups == [[0, 2, 6], [1, 4, 7], [3, 5]]


def test_even_groups_are_contiguous():
    assert group_layers(GroupingTask([0] * 7, 3), "even") == [[0, 1, 2], [3, 4], [5, 6]]


def test_calibrated_drops_the_layers_that_matter_least():
    importance = [9, 1, 8, 2, 7, 3]
    task = GroupingTask([0] * 6, 3, loss_of=lambda kept: -sum(importance[layer] for layer in kept))
    assert group_layers(task, "calibrated") == [[0, 1], [2, 3], [4, 5]]


def test_calibrated_without_texts_is_an_error():
    with pytest.raises(ValueError, match="calibration_dataset"):
        group_layers(GroupingTask([0] * 4, 2), "calibrated")


@pytest.mark.parametrize("capacity", [0, 1, 7])
def test_impossible_capacity(capacity):
    with pytest.raises(ValueError, match="choose a capacity from 2 to 6"):
        group_layers(GroupingTask([0, 1] * 3, capacity))


def test_similarity_is_the_cosine_of_the_flattened_layers():
    stack = find_layer_stack(tiny_model("llama"))
    flat = [torch.cat([parameter.flatten() for parameter in layer.parameters()]) for layer in stack.layers]
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1)
    torch.testing.assert_close(layer_similarity(stack), expected.detach(), atol=1e-5, rtol=1e-5)


def test_layers_of_different_kinds_have_no_similarity():
    similarity = layer_similarity(find_layer_stack(tiny_model("gemma2")))
    assert similarity[0, 1] == 0
    assert similarity[0, 2] != 0
