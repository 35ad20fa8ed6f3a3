from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_llama

from hf_devft.files import write_tensors
from hf_devft.models.layer_files import healed_path, read_healed
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.submodel import build_submodel, build_whole, layers_of
from hf_devft.stages.teaching.distillation import divergence
from hf_devft.stages.teaching.healing import heal, load_taught_state, taught_state


GROUPS = [[0, 1], [2, 3]]
INPUTS = {"input_ids": torch.arange(5, 45).view(4, 10), "attention_mask": torch.ones(4, 10)}


def cut(base):
    stack = find_layer_stack(base)
    submodel = build_submodel(base, stack, GROUPS, "anchor")
    return submodel, layers_of(submodel, stack, GROUPS)


@torch.no_grad()
def distance(teacher, student) -> float:
    return divergence(teacher(**INPUTS).logits, student(**INPUTS).logits).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_were_left_learn_to_stand_for_the_others(dtype):
    base = tiny_llama().to(dtype)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    teacher, (submodel, layers) = build_whole(base).eval(), cut(base)
    unhealed = distance(teacher, submodel)

    def half():
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    assert heal(teacher, submodel, layers, [INPUTS] * 60, 60, 1e-2, half) == 60 * 40
    assert distance(teacher, submodel) < 0.3 * unhealed
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), "the base stays as it is"
    for parameter in submodel.parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert submodel.get_input_embeddings().weight is base.get_input_embeddings().weight, "nothing else is copied"


def test_weights_that_are_tied_stay_so():
    base = tiny_llama()
    for layer in base.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    submodel, layers = cut(base)
    before = layers[0].mlp.up_proj.weight.clone()
    heal(build_whole(base), submodel, layers, [INPUTS], 1, 1e-2, nullcontext)
    assert not torch.equal(layers[0].mlp.up_proj.weight, before)
    assert layers[0].mlp.up_proj.weight is layers[0].mlp.gate_proj.weight
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, before)
    again, others = cut(base)
    load_taught_state(others, taught_state(layers))
    assert distance(submodel, again) == 0


def test_what_was_interrupted_leaves_layers_as_they_are_stored():
    base = tiny_llama().to(torch.bfloat16)
    submodel, layers = cut(base)

    def batches():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        heal(build_whole(base), submodel, layers, batches(), 1, 1e-2, nullcontext)
    assert {parameter.dtype for parameter in submodel.parameters()} == {torch.bfloat16}


def test_healed_layers_are_read_as_they_were_written(tmp_path):
    base = tiny_llama()
    submodel, layers = cut(base)
    heal(build_whole(base), submodel, layers, [INPUTS], 1, 1e-2, nullcontext)
    path = healed_path(tmp_path / "new", 1)
    write_tensors(path, taught_state(layers))
    again, others = cut(base)
    load_taught_state(others, read_healed(path))
    assert distance(submodel, again) == 0
    assert {each.name for each in path.parent.iterdir()} == {path.name, "checksums.json"}
    whole = find_layer_stack(base).layers
    with pytest.raises(ValueError, match="names or shapes differ"):
        load_taught_state(whole, taught_state(layers))
    path.write_bytes(b"no")
    for unreadable in (path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_healed(unreadable)
