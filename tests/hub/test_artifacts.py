import pytest
import torch
from conftest import lora, tiny_llama
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_devft import StageConfig
from hf_devft.models.adapter import adapter_state
from hf_devft.models.adapter_files import load_adapter, save_adapter


@pytest.fixture
def trained():
    model = get_peft_model(tiny_llama(), lora())
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def test_an_adapter_round_trip_with_plain_peft(trained, tmp_path):
    save_adapter(tmp_path, trained.peft_config["default"], adapter_state(trained))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained.eval()(ids).logits)
    config, state = load_adapter(tmp_path)
    assert config.r == 2
    assert all(torch.equal(state[key], tensor) for key, tensor in adapter_state(trained).items())


def test_shared_tensors_are_written_apart(tmp_path):
    tensor = torch.ones(2, 2)
    save_adapter(tmp_path, lora(), {"a": tensor, "b": tensor})
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"a", "b"}


def test_broken_and_foreign_adapters_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="no readable adapter"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, trained.peft_config["default"], adapter_state(trained))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="no readable adapter"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, LoHaConfig(), {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="LoraConfig"):
        load_adapter(tmp_path)


def test_every_stage_is_a_plain_peft_adapter(make_trainer):
    """What the trainer measured at full depth is what a user loads."""
    trainer = make_trainer(transfer="split")
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    outputs = []
    for subfolder in ("", "stage-1", "stage-2"):
        model = PeftModel.from_pretrained(tiny_llama(), trainer.args.output_dir, subfolder=subfolder or None)
        with torch.no_grad():
            outputs.append(model(ids).logits)
    with torch.no_grad():
        assert torch.equal(outputs[0], trainer.model.eval()(ids).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[1], outputs[2])


def test_the_compact_adapter_travels_with_its_stage(make_trainer):
    trainer = make_trainer()
    trainer.train()
    folder = f"{trainer.args.output_dir}/stage-1"
    _, state = load_adapter(f"{folder}/submodel")
    layers = {key.split(".layers.")[1].split(".")[0] for key in state}
    assert len(layers) == StageConfig.from_pretrained(folder).num_layers == 2


def test_stages_hold_no_pickle(make_trainer):
    trainer = make_trainer()
    trainer.train()
    from pathlib import Path

    suffixes = {path.suffix for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".png", ".jinja", ".lock"}
