"""Below the lowest layer that is trained nothing is kept for the backward pass, and no gradient is computed."""

import pytest
import torch
from conftest import lora

from hf_devft import DevFTTrainer


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointing"])
def test_no_gradient_goes_below_the_lowest_trained_layer(make_trainer, options):
    needed = {}

    class Watched(DevFTTrainer):
        def prepare_model_in_use(self, model):
            for index, layer in enumerate(model.get_base_model().model.layers):
                layer.register_forward_hook(lambda _, args, output, index=index: self.note(index, output))

        def note(self, index, output):
            if torch.is_grad_enabled():
                needed[index] = (output[0] if isinstance(output, tuple) else output).requires_grad

    peft_config = lora(layers_to_transform=[2, 3], target_modules=["q_proj", "up_proj"])
    make_trainer(cls=Watched, stage_layers=[4], stage_rounds=[1], peft_config=peft_config, **options).train()
    assert needed == {0: False, 1: False, 2: True, 3: True}
