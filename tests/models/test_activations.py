from accelerate import init_empty_weights
from conftest import lora
from transformers import LlamaConfig, LlamaForCausalLM

from hf_devft.models.activations import activations
from hf_devft.models.adapter import new_adapter


def test_checkpointing_keeps_nothing_below_the_lowest_adapter():
    model = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=256, num_hidden_layers=8)
    kept = []
    for lowest in (0, 4, 6):
        with init_empty_weights():
            adapter = lora(target_modules=["q_proj"], layers_to_transform=list(range(lowest, 8)))
            kept.append(activations(new_adapter(LlamaForCausalLM(model), adapter), 4, 512, checkpointing=True)[0])
    layer_input = 4 * 512 * 64 * 4
    assert [(kept[0] - each) / layer_input for each in kept[1:]] == [4, 6]
