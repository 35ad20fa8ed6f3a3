import copy

import pytest
import torch
from architectures import tiny_model
from transformers import AutoModelForCausalLM

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.streaming import load_base
from hf_devft.models.weights import dense, is_stored, read_slice
from hf_devft.stages.grouping import similarity_of, weight_gram
from hf_devft.stages.submodel import build_submodel, build_whole


GROUPS = [[0, 1, 4], [2], [3, 5]]
INPUT = torch.tensor([[3, 9, 27, 5]])


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def checkpoint(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@torch.no_grad()
def test_layers_are_read_when_a_submodel_needs_them(checkpoint):
    streamed = load_base(str(checkpoint)).eval()
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    stack, same = find_layer_stack(streamed), find_layer_stack(loaded)
    assert stack.kinds == same.kinds
    parameters = [parameter for layer in stack.layers for parameter in layer.parameters()]
    assert all(map(is_stored, parameters))
    assert not any(parameter.is_meta for parameter in streamed.parameters() if not is_stored(parameter))
    torch.testing.assert_close(similarity_of(weight_gram(stack)), similarity_of(weight_gram(same)))
    for fusion in ("differential", "mean", "anchor"):
        groups = copy.deepcopy(GROUPS)
        submodels = [build_submodel(m, s, groups, fusion) for m, s in ((streamed, stack), (loaded, same))]
        assert torch.equal(submodels[0](INPUT).logits, submodels[1](INPUT).logits)
    assert torch.equal(build_whole(streamed)(INPUT).logits, loaded(INPUT).logits)
    assert all(parameter.is_meta for layer in stack.layers for parameter in layer.parameters()), (
        "the base stays where it is"
    )


def test_a_dtype_is_that_of_from_pretrained(checkpoint):
    streamed = build_whole(load_base(str(checkpoint), dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in streamed.parameters()} == {torch.bfloat16}


def test_a_device_map_loads_everything_at_once(checkpoint):
    assert not any(map(is_stored, load_base(str(checkpoint), device_map="cpu").parameters()))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_piece_is_a_part_of_the_whole(tmp_path, stored):
    tiny_model("llama").to(stored).save_pretrained(tmp_path)
    for parameter in find_layer_stack(load_base(str(tmp_path), dtype=torch.float32)).layers[1].parameters():
        whole = dense(parameter).flatten()
        for start, stop in ((0, 3), (5, 9), (whole.numel() - 2, whole.numel() + 7)):
            values = read_slice(parameter, start, stop)
            assert values.dtype == torch.float32
            assert torch.equal(values, whole[start:stop])


def test_a_checkpoint_that_has_become_shorter_is_an_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    parameters = list(find_layer_stack(load_base(str(tmp_path))).layers[-1].parameters())
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(OSError, match="fetch the checkpoint again"):
        [read_slice(parameter, 0, 2**20) for parameter in parameters]
