from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_llama

from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.stages.bridges import best_blocks, normalise
from hf_devft.stages.submodel import build_submodel, layers_of
from hf_devft.stages.teaching.bridging import bridge_errors, fit_bridges
from hf_devft.stages.teaching.distillation import divergence


def batches(count: int = 4, seed: int = 0):
    """Rows of 5 to 20 tokens, the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(5, 2000, (16, 20), generator=generator)
        lengths = torch.randint(5, 21, (16,), generator=generator)
        yield {"input_ids": ids, "attention_mask": (torch.arange(20) < lengths[:, None]).long()}


class AffineLayer(torch.nn.Module):
    """What a bridge can be exactly."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer  # for its parameters
        self.map = torch.nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + normalise(hidden_states) @ self.map.T + 0.3


def bridged(base, groups, **kwargs):
    stack = find_layer_stack(base)
    submodel = build_submodel(base, stack, groups, "bridge")
    layers = layers_of(submodel, stack, groups)
    bridges = {
        (group[0], group[-1]): layer.bridge for group, layer in zip(groups, layers, strict=True) if len(group) > 1
    }
    fit_bridges(base, stack.layers, bridges, batches(**kwargs), nullcontext)
    return submodel.eval()


@torch.no_grad()
def test_a_block_that_is_such_a_map_is_found_and_met():
    base = tiny_llama().eval()
    base.model.layers[2] = AffineLayer(base.model.layers[2])
    base.model.layers[2].attention_type = "full_attention"
    errors = bridge_errors(base, base.model.layers, batches(), nullcontext)
    assert errors[1, 2] < 1e-4 * errors[0, 1]
    assert best_blocks(errors, 3) == [[0], [1, 2], [3]]
    submodel, inputs = bridged(base, [[0], [1, 2], [3]]), next(iter(batches(1, seed=9)))
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(submodel(**inputs).logits[mask], base(**inputs).logits[mask], atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_errors_are_relative_and_by_position():
    """Those of the bridge that is fitted on the same texts; estimated in as many random directions as there are."""
    base = tiny_llama().eval()
    errors = bridge_errors(base, base.model.layers, batches(), nullcontext)
    bridge = bridged(base, [[0], [1, 2], [3]]).model.layers[1].bridge
    wrong = size = 0.0
    for inputs in batches():
        states = base(**inputs, output_hidden_states=True).hidden_states
        before, after = states[2], states[3]  # into and out of layer 2
        weights = inputs["attention_mask"] / before.square().sum(-1)
        wrong += ((bridge(before) - after).square().sum(-1) * weights).sum().item()
        size += (after.square().sum(-1) * weights).sum().item()
    assert errors[1, 2].item() == pytest.approx(wrong / size, rel=0.3)


@torch.no_grad()
def test_a_bridged_submodel_is_nearer_to_the_base_on_other_texts():
    base = tiny_llama(6).eval()
    groups = [[0], [1, 2, 3], [4], [5]]
    stack = find_layer_stack(base)
    submodel, plain = bridged(base, groups, count=8), build_submodel(base, stack, groups, "anchor").eval()
    inputs = next(iter(batches(1, seed=9)))
    said = base(**inputs).logits
    distances = [
        divergence(said, model(**inputs).logits, inputs["attention_mask"]).item() for model in (submodel, plain)
    ]
    assert distances[0] < 0.8 * distances[1]
