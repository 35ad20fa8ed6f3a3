import copy

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.grouping import GROUPINGS, GroupingTask, adapter_gram, group_layers, similarity_of, weight_gram


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
    errors = torch.rand(depth, depth, generator=generator)
    return GroupingTask(
        kinds, capacity, seed, lambda: similarity, lambda kept, candidates: [importance[each] for each in candidates],
        lambda: errors,
    )  # fmt: skip


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
    if rule != "bridged":  # which moves nothing from layer to layer
        assert all(len({task.kinds[layer] for layer in group}) == 1 for group in groups)
    assert group_layers(task, rule) == groups, "same seed, same groups"


@pytest.mark.parametrize("rule", ["deconfliction", "normalized_cut"])
def test_cuts_find_the_blocks_of_a_similarity(rule):
    blocks = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])
    similarity = torch.where(blocks[:, None] == blocks, 0.9, 0.05)
    groups = group_layers(GroupingTask([0] * 8, 3, similarity=lambda: similarity), rule)
    assert groups == [[0, 2, 6], [1, 4, 7], [3, 5]]


def test_only_the_normalised_cut_balances_the_groups():
    """Of two cliques and a layer that is hardly tied to any, cutting that one off costs least."""
    similarity = torch.full((6, 6), 0.3)
    similarity[:3, :3] = similarity[3:5, 3:5] = 1
    similarity[5, :5] = similarity[:5, 5] = 0.05
    similarity.fill_diagonal_(1)
    task = GroupingTask([0] * 6, 2, similarity=lambda: similarity)
    assert group_layers(task, "deconfliction") == [[0, 1, 2, 3, 4], [5]]
    assert group_layers(task, "normalized_cut") == [[0, 1, 2], [3, 4, 5]]


def test_layers_that_point_apart_are_cut_first():
    """Edges of negative weight are worth cutting: every pair but (0, 1) and (2, 3) conflicts."""
    similarity = torch.full((4, 4), -0.2)
    similarity[0, 1] = similarity[1, 0] = similarity[2, 3] = similarity[3, 2] = 0.3
    similarity.fill_diagonal_(1)
    assert group_layers(GroupingTask([0] * 4, 2, similarity=lambda: similarity)) == [[0, 1], [2, 3]]


def test_even_groups_are_contiguous():
    assert group_layers(GroupingTask([0] * 7, 3), "even") == [[0, 1, 2], [3, 4], [5, 6]]


def test_calibrated_drops_the_layers_that_matter_least():
    importance = [9, 1, 8, 2, 7, 3]
    task = GroupingTask([0] * 6, 3, losses_without=lambda kept, candidates: [importance[each] for each in candidates])
    assert group_layers(task, "calibrated") == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("capacity", [0, 1, 7])
def test_impossible_capacity(capacity):
    with pytest.raises(ValueError, match="choose a capacity from 2 to 6"):
        group_layers(GroupingTask([0, 1] * 3, capacity))


def test_similarity_is_the_cosine_of_the_flattened_layers():
    stack = find_layer_stack(tiny_model("llama"))
    flat = [torch.cat([parameter.flatten() for parameter in layer.parameters()]) for layer in stack.layers]
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1)
    torch.testing.assert_close(similarity_of(weight_gram(stack)), expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_layers_adapter_is_part_of_it():
    base = tiny_model("llama")
    stack = find_layer_stack(base)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    state = {key: torch.randn_like(tensor) for key, tensor in get_peft_model_state_dict(model).items()}
    flat = [
        torch.cat(
            [parameter.flatten() for parameter in layer.parameters()]
            + [tensor.flatten() for key, tensor in state.items() if f".layers.{index}." in key]
        )
        for index, layer in enumerate(stack.layers)
    ]
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1)
    similarity = similarity_of(weight_gram(stack) + adapter_gram(stack, state))
    torch.testing.assert_close(similarity, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", [
    LoraConfig(target_modules=["q_proj"], use_dora=True), IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
])  # fmt: skip
def test_an_adapter_that_changes_nothing_makes_no_layers_alike(adapter):
    """Nor do LoRA's own factors, of which A is drawn."""
    model = get_peft_model(tiny_model("llama"), adapter)
    state = {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if "lora_A" not in key}
    assert not adapter_gram(find_layer_stack(model.get_base_model()), state).any()


def test_layers_of_different_kinds_have_no_similarity():
    similarity = similarity_of(weight_gram(find_layer_stack(tiny_model("gemma2"))))
    assert similarity[0, 1] == 0
    assert similarity[0, 2] != 0
