import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.models.layer_stack import LayerNames
from hf_devft.stages.grouping import GroupingTask, group_layers
from hf_devft.stages.transfer import expand_adapter, fuse_adapter


def names(depth: int) -> LayerNames:
    return LayerNames({"model.layers": depth})


def adapter(layers: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {"base_model.model.lm_head.lora_A.weight": torch.randn(2, 3, generator=generator)}
    for layer in range(layers):
        for part in "AB":
            key = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{part}.weight"
            state[key] = torch.randn(2, 3, generator=generator)
    return state


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@given(
    depth=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 999),
    fusion=st.sampled_from(["differential", "mean", "anchor"]), beta=st.floats(-1, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_broadcast_then_fusion_over_the_same_groups_gives_the_adapter_back(depth, share, seed, fusion, beta):
    groups = group_layers(GroupingTask([0] * depth, max(1, round(share * depth)), seed), "random")
    sub = adapter(len(groups), seed)
    full = expand_adapter(sub, adapter(depth, seed + 1), names(depth), groups, "broadcast")
    assert full.keys() == adapter(depth).keys()
    assert equal(fuse_adapter(full, names(depth), groups, fusion, beta), sub)


def test_broadcast_gives_every_member_its_representatives_adapter():
    groups = [[0, 2], [1, 3]]
    sub = adapter(2)
    full = expand_adapter(sub, adapter(4, seed=1), names(4), groups)
    for index, group in enumerate(groups):
        for layer in group:
            for part in "AB":
                key = "base_model.model.model.layers.{}.mlp.up_proj.lora_" + part + ".weight"
                assert torch.equal(full[key.format(layer)], sub[key.format(index)])


def test_anchor_transfer_leaves_the_others_as_they_were():
    before = adapter(4, seed=1)
    full = expand_adapter(adapter(2), before, names(4), [[0, 2], [1, 3]], "anchor")
    for layer in (2, 3):
        key = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_B.weight"
        assert torch.equal(full[key], before[key])


def test_split_transfer_keeps_the_sum_of_the_products():
    sub, groups = adapter(1), [[0, 1, 2]]
    full = expand_adapter(sub, adapter(3, seed=1), names(3), groups, "split")

    def product(state, layer):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        return state[f"{name}B.weight"].T @ state[f"{name}A.weight"]

    torch.testing.assert_close(sum(product(full, layer) for layer in range(3)), product(sub, 0))


def test_tensors_outside_the_stack_pass_through():
    sub = adapter(2)
    full = expand_adapter(sub, adapter(4, seed=1), names(4), [[0, 1], [2, 3]])
    key = "base_model.model.lm_head.lora_A.weight"
    assert torch.equal(full[key], sub[key])
    assert torch.equal(fuse_adapter(full, names(4), [[0, 1], [2, 3]], "differential")[key], sub[key])


def test_where_the_anchor_stays_the_others_need_no_adapter():
    full = adapter(4)
    full = {key: value for key, value in full.items() if ".layers.3." not in key and ".layers.1." not in key}
    fused = fuse_adapter(full, names(4), [[0, 1], [2, 3]], "anchor")
    key = "base_model.model.model.layers.{}.mlp.up_proj.lora_B.weight"
    assert torch.equal(fused[key.format(1)], full[key.format(2)])
