"""4-bit bases, whole runs: group -> dequantise, fuse, requantise -> train -> transfer."""

import contextlib

import pytest
import torch
from conftest import config, lora
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    set_seed,
)

from hf_devft import DevFTTrainer


bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose matrices are as wide as bitsandbytes' CPU kernels want them."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=256, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.filterwarnings("error:bitsandbytes.*autograd kernel was not registered")
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_on_a_4_bit_base(wide, tmp_path, tasks, eval_tasks, tokenizer, evaluated):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=four_bit)
    trainer = DevFTTrainer(
        base,
        config(
            tmp_path / "run", stage_layers=[2, 3, 4], fusion="differential", stage_rounds=[3], local_steps=5,
            eval_strategy="steps" if evaluated else "no", eval_steps=1,
        ),
        peft_config=lora(),
        train_dataset=tasks,
        eval_dataset=eval_tasks if evaluated else None,
        processing_class=tokenizer,
    )  # fmt: skip
    kinds = []

    class Noting(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, **kwargs):
            kinds.append(packed(model))

    trainer.add_callback(Noting())
    trainer.train()
    assert kinds == [2 * 7, 3 * 7, 4 * 7], "every matrix of every stage is 4-bit"
    losses = [record.loss for record in trainer.ledger.rounds]
    assert losses[-1] < losses[0]
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
    fresh = AutoModelForCausalLM.from_pretrained(wide, quantization_config=four_bit)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "run")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # in training, as evaluations use other kernels
        torch.testing.assert_close(loaded.train()(tokens).logits, trainer.model.train()(tokens).logits)


def test_submodels_of_an_8_bit_base_have_its_weights(wide, tmp_path, tasks, tokenizer):
    """Whose scales bitsandbytes moves from a parameter to the first module that uses it."""
    eight_bit = BitsAndBytesConfig(load_in_8bit=True)
    trainer = DevFTTrainer(
        AutoModelForCausalLM.from_pretrained(wide, quantization_config=eight_bit),
        config(tmp_path / "run", grouping="even", stage_layers=[2, 4], stage_rounds=[1]),
        peft_config=lora(),
        train_dataset=tasks,
        processing_class=tokenizer,
    )
    trainer.train()
    fresh = AutoModelForCausalLM.from_pretrained(wide, quantization_config=eight_bit)
    loaded, tokens = PeftModel.from_pretrained(fresh, tmp_path / "run"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def packed(model: torch.nn.Module) -> int:
    return sum(isinstance(parameter, bitsandbytes.nn.Params4bit) for parameter in model.parameters())


def test_a_base_that_was_evaluated_before_is_whole_or_refused(wide, tmp_path, tasks, tokenizer):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=four_bit).eval()
    with torch.no_grad():
        base(torch.tensor([[5, 6, 7, 8]]))
    repacked = any(getattr(p.quant_state, "packing_format_for_cpu", False) for p in base.parameters()
                   if isinstance(p, bitsandbytes.nn.Params4bit))  # fmt: skip
    options = {"peft_config": lora(), "train_dataset": tasks, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="load it again") if repacked else contextlib.nullcontext():
        DevFTTrainer(base, config(tmp_path / "run"), **options)


def test_a_4_bit_base_by_config_alone(wide, tmp_path, tasks, tokenizer):
    trainer = DevFTTrainer(
        str(wide),
        config(tmp_path / "run", model_init_kwargs={"quantization_config": {"load_in_4bit": True}}, stage_rounds=[1]),
        peft_config=lora(),
        train_dataset=tasks,
        processing_class=tokenizer,
    )
    assert packed(trainer.model) == 4 * 7
    trainer.train()
    assert trainer.stages[-1].rounds_done == 1
