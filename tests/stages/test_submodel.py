import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.fusion import fuse
from hf_devft.stages.grouping import weight_gram
from hf_devft.stages.submodel import build_submodel, reloads_alike


INPUT = torch.tensor([[3, 9, 27, 5]])
GROUPS = [[0, 2], [1], [3, 4, 5]]


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["differential", "mean", "sum"])
def test_every_parameter_of_a_group_is_fused(fusion):
    model = tiny_model("llama")
    stack = find_layer_stack(model)
    original = copy.deepcopy(model.state_dict())
    submodel = build_submodel(model, stack, GROUPS, fusion, beta=0.1)
    for index, group in enumerate(GROUPS):
        for name, parameter in submodel.model.layers[index].named_parameters():
            members = [stack.layers[layer].get_parameter(name) for layer in group]
            assert torch.equal(parameter, fuse(members, fusion, 0.1)), name
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_shared_parts_and_groups_of_one_cost_nothing():
    model = tiny_model("llama")
    stack = find_layer_stack(model)
    submodel = build_submodel(model, stack, GROUPS, "differential")
    assert submodel.get_input_embeddings().weight is model.get_input_embeddings().weight
    single = submodel.model.layers[1]
    assert all(parameter is stack.layers[1].get_parameter(name) for name, parameter in single.named_parameters())


def test_full_capacity_is_the_model_again_on_the_same_tensors():
    model = tiny_model("llama")
    whole = build_submodel(model, find_layer_stack(model), [[index] for index in range(6)], "anchor")
    assert whole is not model, "what is done to it (adapters, hooks of an engine) leaves the model as it is"
    assert list(map(id, whole.parameters())) == list(map(id, model.parameters()))


class Packed(torch.nn.Module):
    """A linear module as GPTQ's: integers in a buffer."""

    def __init__(self, of: torch.nn.Linear):
        super().__init__()
        self.in_features = of.in_features
        self.register_buffer("qweight", of.weight.to(torch.int32))


def test_weights_in_buffers_are_neither_compared_nor_fused():
    model = tiny_model("llama")
    stack = find_layer_stack(model)
    for layer in stack.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    with pytest.raises(ValueError, match=r"weights of torch.int32: only bitsandbytes .* can be grouped by similarity"):
        weight_gram(stack)
    groups = [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="Load it in 4 bits or unquantised"):
        build_submodel(model, stack, groups, "differential")
    build_submodel(model, stack, groups, "anchor")


@torch.no_grad()
def test_equal_layers_fuse_to_a_model_of_those_layers():
    model = tiny_model("llama")
    stack = find_layer_stack(model)
    for layer in stack.layers:
        layer.load_state_dict(stack.layers[0].state_dict())
    fused, anchored = (build_submodel(model, stack, GROUPS, fusion) for fusion in ("differential", "anchor"))
    assert torch.equal(fused(INPUT).logits, anchored(INPUT).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_architecture_reloads_as_the_submodel_that_was_saved(name):
    model = tiny_model(name)
    stack = find_layer_stack(model)
    layers = sorted({stack.kinds.index(kind) for kind in stack.kinds})
    groups = [[layer] for layer in layers[:-1]] + [list(range(layers[-1], len(stack)))]
    assert reloads_alike(build_submodel(model, stack, groups, "anchor"))


def test_an_architecture_that_makes_more_of_a_layers_number_is_known():
    config = GPT2Config(n_layer=4, n_head=2, n_embd=16, vocab_size=64, scale_attn_by_inverse_layer_idx=True)
    model = GPT2LMHeadModel(config)
    assert not reloads_alike(build_submodel(model, find_layer_stack(model), [[0, 1], [2, 3]], "anchor"))
