"""Any model that has a stack of layers: build, train, hand over, save, load with plain PEFT."""

import pytest
import torch
import transformers as hf
from conftest import config
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from transformers import set_seed

from hf_devft import DevFTTrainer, StageConfig, load_submodel
from hf_devft.models.adapter_files import load_adapter


ROWS, LENGTH = 24, 8
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 48,
}
DECODER = SIZES | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = SIZES | {"pad_token_id": 0}
WHISPER = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
    "max_source_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
T5 = {
    "vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
WAVES = {
    "conv_dim": [16] * 4, "conv_stride": [2] * 4, "conv_kernel": [3] * 4, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# Name -> (model, task type, layers of the stages, modules that are adapted).
MODELS = {
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=2)),
                "CAUSAL_LM", [2, 4], "all-linear"),
    "qwen3_moe": (lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(
                  **DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)),
                  "CAUSAL_LM", [2, 4], "all-linear"),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(
               **DECODER, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)),
               "CAUSAL_LM", [2, 4], "all-linear"),
    "gpt2_classifier": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(
                        n_layer=4, n_head=2, n_embd=16, vocab_size=48, pad_token_id=0, num_labels=3,
                        bos_token_id=1, eos_token_id=2)), "SEQ_CLS", [2, 4], ["c_attn"]),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)),
             "SEQ_CLS", [2, 4], "all-linear"),
    "roberta_tokens": (lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(
                       **ENCODER, num_labels=3, bos_token_id=1, eos_token_id=2)), "TOKEN_CLS", [2, 4],
                       ["query", "value"]),
    "deberta": (lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(
                **ENCODER, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
                max_relative_positions=8)), "SEQ_CLS", [2, 4], "all-linear"),
    "modernbert": (lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(
                   **ENCODER, num_labels=3, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
                   "SEQ_CLS", [3, 4], "all-linear"),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(
            **{name: size for name, size in SIZES.items() if name != "vocab_size"}, image_size=8, patch_size=4,
            num_labels=3)), None, [2, 4], "all-linear"),
    "wav2vec2": (lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**ENCODER, **WAVES, num_labels=3)),
                 None, [2, 4], ["q_proj", "v_proj"]),
    "hubert": (lambda: hf.HubertForSequenceClassification(hf.HubertConfig(**ENCODER, **WAVES, num_labels=3)),
               None, [2, 4], ["q_proj", "v_proj"]),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "SEQ_2_SEQ_LM", [4, 7], "all-linear"),
    "t5_decoder": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "SEQ_2_SEQ_LM", [2, 4], "all-linear"),
    "whisper": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)), None, [2, 6], "all-linear"),
}  # fmt: skip


def rows_for(model: torch.nn.Module, task_type: str | None) -> Dataset:
    """Random rows as the model reads them."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    tokens = torch.randint(4, 48, (ROWS, LENGTH), generator=generator)
    shapes = {
        "pixel_values": (ROWS, 3, 8, 8),
        "input_features": (ROWS, 4, 16),
        "input_values": (ROWS, 160),
    }
    name = model.main_input_name
    inputs = {name: tokens if name == "input_ids" else torch.randn(shapes[name], generator=generator)}
    if name == "input_ids":
        inputs["attention_mask"] = torch.ones_like(tokens)
    words = task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or config.is_encoder_decoder
    classes = torch.randint(0, 3, (ROWS, LENGTH) if task_type == "TOKEN_CLS" else (ROWS,), generator=generator)
    inputs["labels"] = tokens if words else classes
    return Dataset.from_dict({key: value.tolist() for key, value in inputs.items()})


@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_two_stages_loads_with_plain_peft(name, tmp_path):
    make, task_type, layers, modules = MODELS[name]
    set_seed(0)
    model = make().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = rows_for(model, task_type)
    head = ["classifier"] if task_type is None and hasattr(model, "classifier") else None
    sizes = {"stage_layers": layers, "stage_rounds": [1], "local_steps": 1, "num_clients": 2, "clients_per_batch": 2}
    trainer = DevFTTrainer(
        model,
        config(tmp_path, **sizes, learning_rate=1e-2, stack="decoder" if name == "t5_decoder" else None),
        peft_config=LoraConfig(r=2, target_modules=modules, task_type=task_type, modules_to_save=head),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=hf.default_data_collator,
    )
    trainer.train()
    assert all(record.flops > 0 for record in trainer.ledger.rounds)

    batch = {key: torch.tensor(value) for key, value in rows[:4].items()}
    with torch.no_grad():
        trained = trainer.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(copy_of(make, before), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, trained)
        untrained = copy_of(make, before)(**batch).logits
        assert not torch.allclose(trained, untrained), "the adapter does something"

        first = StageConfig.from_pretrained(tmp_path, subfolder="stage-1")
        assert len(first.groups) == layers[0]
        submodel = load_submodel(copy_of(make, before), tmp_path, stage=1)
        assert submodel(**batch).loss.isfinite()
    if task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or head:
        weights = [key for key in trainer.run.adapter.state if ".classifier." in key or ".score." in key]
        assert weights, "the head is trained whole and travels"


def test_an_adapter_on_one_side_of_an_encoder_decoder(tmp_path):
    """By a regular expression, which is not run again on what others might have made."""
    make, *_ = MODELS["whisper"]
    set_seed(0)
    model = make().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = DevFTTrainer(
        model,
        config(tmp_path, stage_layers=[2, 3], stage_rounds=[1], local_steps=1, num_clients=2, stack="decoder"),
        peft_config=LoraConfig(r=2, target_modules=r".*decoder.*\.(q_proj|v_proj)"),
        train_dataset=rows_for(model, None),
        data_collator=hf.default_data_collator,
    )
    trainer.train()
    load_submodel(copy_of(make, before), tmp_path, stage=1)
    config_read, _ = load_adapter(tmp_path)
    assert "encoder_attn" in config_read.target_modules
    assert "model\\.encoder" not in config_read.target_modules


def copy_of(make, state) -> torch.nn.Module:
    model = make().eval()
    model.load_state_dict(state)
    return model
