import math

import pytest
import torch
from conftest import lora
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.models.initialisation import moves_weights, on_whole_weights, without_weight_based_init
from hf_devft.models.layout import lora_scaling


A, B = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"


def factors(rank: int, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, columns, generator=generator), B: torch.randn(rows, rank, generator=generator)}


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_the_saved_adapter_is_the_difference_of_the_products(rank, rows, columns, rslora, seed):
    config = lora(r=rank, lora_alpha=3, use_rslora=rslora, init_lora_weights="pissa")
    state, initial = (factors(rank, rows, columns, seed + own) for own in (0, 100))
    head = {"lm_head.weight": torch.ones(2)}
    saved_config, saved = on_whole_weights(config, state | head, initial)
    change = lora_scaling(config) * (state[B] @ state[A] - initial[B] @ initial[A])
    torch.testing.assert_close(lora_scaling(saved_config) * saved[B] @ saved[A], change, rtol=1e-4, atol=1e-4)
    assert saved_config.r == saved[A].shape[0] == 2 * rank
    assert math.isclose(lora_scaling(saved_config), lora_scaling(config))
    assert torch.equal(saved[A][:rank], state[A])
    assert saved["lm_head.weight"] is head["lm_head.weight"]
    assert config.r == rank


@pytest.mark.parametrize(("init", "moves"), [("pissa", True), ("pissa_niter_4", True), ("olora", True), (True, False),
                                             ("orthogonal", False)])  # fmt: skip
def test_which_initialisations_change_the_base(init, moves):
    config = lora(init_lora_weights=init)
    assert moves_weights(config) == moves
    assert not moves_weights(without_weight_based_init(config))
    assert config.init_lora_weights == init
