import pytest
import torch
from conftest import lora, tiny_llama

from hf_devft.models.adapter import adapter_state, new_adapter
from hf_devft.models.layout import A, AdapterLayout, B


@pytest.fixture
def model():
    return new_adapter(tiny_llama(), lora(target_modules=["q_proj", "embed_tokens"]))


def test_the_layout_of_a_model(model):
    layout, state = AdapterLayout.of(model), adapter_state(model)
    assert set(layout.keys) == set(state)
    assert layout.scaling == 2.0
    flat = layout.flat(state)
    assert all(torch.equal(value, state[key]) for key, value in layout.state(flat).items())
    assert [part.shape for part in layout.cut(flat)] == list(layout.shapes)
    assert sorted(layout.named(A) + layout.named(B)) == list(layout.all)
    assert {layout.layers[place] for place in layout.all} == {None, 0, 1, 2, 3}
    for pair in layout.pairs:
        assert layout.keys[pair.a].startswith(pair.module)
        assert layout.keys[pair.b].startswith(pair.module)
        assert layout.shapes[pair.b][1] == layout.shapes[pair.a][0] == 2
    assert len(layout.pairs) == 5


def test_picking_and_putting(model):
    layout = AdapterLayout.of(model)
    flat = torch.arange(float(sum(layout.sizes)))
    places = layout.named(B)
    values = layout.pick(flat, places)
    assert values.numel() == sum(layout.sizes[place] for place in places)
    assert layout.pick(flat, layout.all) is flat, "no copy"
    assert layout.pick(flat, ()).numel() == 0
    target = torch.zeros_like(flat)
    layout.put(target, places, values)
    layout.put(target, places, values, alpha=2.0)
    assert torch.equal(layout.pick(target, places), 3 * values)
    assert not layout.pick(target, layout.named(A)).any()
    assert set(layout.state(flat, places)) == {layout.keys[place] for place in places}
