import pytest
import torch
from conftest import lora, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from hf_devft.models.adapter import adapter_state, attach_adapter, new_adapter
from hf_devft.models.layout import RESIDUAL
from hf_devft.models.residual import PatchedBaseWeights, product_adapter, without_residual


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@given(rank=st.integers(1, 5), rslora=st.booleans(), seed=st.integers(0, 50))
def test_the_product_does_what_both_do(rank, rslora, seed):
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=rslora)
    a, b = random(2, 5, seed=seed), random(6, 2, seed=seed + 1)
    residual = random(6, rank, seed=seed + 2) @ random(rank, 5, seed=seed + 3)
    state = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    widened, product = product_adapter(config, state, {"m" + RESIDUAL: residual})
    assert widened.r == 2 + rank
    scalings = [c.lora_alpha / (c.r**0.5 if rslora else c.r) for c in (config, widened)]
    assert scalings[0] == pytest.approx(scalings[1])
    both = scalings[0] * b @ a + residual
    torch.testing.assert_close(
        scalings[1] * product["m.lora_B.weight"] @ product["m.lora_A.weight"], both, rtol=1e-4, atol=1e-4
    )
    back = without_residual(product, config)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_without_a_residual_nothing_changes():
    config, state = lora(), {"m.lora_A.weight": torch.ones(2, 3)}
    assert product_adapter(config, state, {}) == (config, state)


def test_open_weights_are_the_models_own():
    base = tiny_llama()
    twin = tiny_llama()  # shares nothing, but has the same values
    model = new_adapter(base, lora())
    originals = {
        name: module.get_base_layer().weight for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    weights = PatchedBaseWeights(model)
    residual = {name + RESIDUAL: random(*weight.shape) for name, weight in originals.items()}
    ids = torch.tensor([[1, 2, 3]])
    for factor in (1.0, 2.0):  # set, not added once more
        weights.set({key: factor * value for key, value in residual.items()})
    config, product = product_adapter(
        lora(), adapter_state(model), {key: 2 * value for key, value in residual.items()}
    )
    other = attach_adapter(twin, config, product)
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    untouched = dict(tiny_llama().named_modules())
    for name, weight in originals.items():
        assert torch.equal(weight, untouched[name.removeprefix("base_model.model.")].weight), "the base is as it was"


def test_an_embedding_has_no_room():
    with pytest.raises(ValueError, match="embedding"):
        PatchedBaseWeights(new_adapter(tiny_llama(), lora(target_modules=["embed_tokens", "q_proj"])))
