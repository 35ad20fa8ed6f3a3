"""Stages whose submodels have bridges for the layers that are left out, and stages that leave no layer out."""

from pathlib import Path

import pytest
from architectures import tiny_model
from conftest import lora, tiny_llama
from peft import IA3Config
from safetensors.torch import load_file
from test_mixin import assert_equal, final_adapter

from hf_devft import load_submodel
from hf_devft.models.layer_files import healed_path, read_healed
from hf_devft.models.layer_stack import find_layer_stack


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
BRIDGED = {"grouping": "bridged", "fusion": "bridge", "transfer": "anchor"}


def layer_of(key: str) -> int:
    return int(key.partition(".layers.")[2].partition(".")[0])


def test_only_bridges_are_kept_of_a_bridged_submodel(make_trainer):
    trainer = make_trainer(**BRIDGED)
    trainer.train()
    first, second = trainer.stages
    assert [group for group in first.groups if len(group) > 1]
    assert first.totals["setup_flops"] > 0 == second.totals["setup_flops"]
    folder = Path(trainer.args.output_dir)
    state = read_healed(healed_path(folder / "stage-1" / "submodel", 1))
    assert state
    assert all(".bridge." in name for name in state)
    assert "bridged on the server's texts" in (folder / "README.md").read_text()
    model = load_submodel(tiny_llama(), folder, stage=1)
    loaded = {name: tensor for name, tensor in model.named_parameters() if ".bridge." in name}
    assert len(loaded) == len(state)
    assert all(tensor.abs().sum() > 0 for tensor in loaded.values())
    adapter = load_file(folder / "stage-1" / "adapter_model.safetensors")
    kept = {group[0] for group in first.groups}
    for key, tensor in adapter.items():
        assert "lora_B" not in key or tensor.any() == (layer_of(key) in kept), "what is bridged keeps its adapter"


def test_a_bridged_run_goes_on_bit_for_bit(make_trainer, tmp_path):
    options = BRIDGED | {"stage_layers": [2, 3, 4], "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    for point in ("checkpoint-1", "checkpoint-2"):
        resumed = make_trainer(output_dir=tmp_path / point, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / point))
        assert_equal(final_adapter(whole), final_adapter(resumed))


@pytest.mark.parametrize("end", ["first", "last"])
def test_layers_get_their_adapters_stage_by_stage(make_trainer, eval_tasks, tmp_path, end):
    options = {
        "stage_layers": None, "adapter_layers": [1, 3, 4], "adapter_layers_from": end, "wire_dtype": "int8",
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    trainer = make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / "whole", **options)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    expected = {"first": [{0}, {0, 1, 2}, {0, 1, 2, 3}], "last": [{3}, {1, 2, 3}, {0, 1, 2, 3}]}[end]
    for stage, layers in zip(trainer.stages, expected, strict=True):
        full = load_file(folder / f"stage-{stage.stage}" / "adapter_model.safetensors")
        compact = load_file(folder / f"stage-{stage.stage}" / "submodel" / "adapter_model.safetensors")
        assert {layer_of(key) for key in full} == {0, 1, 2, 3}
        assert {layer_of(key) for key in compact} == layers
        assert {layer_of(key) for key, tensor in full.items() if "lora_B" in key and tensor.any()} == layers
        assert stage.num_layers == 4
        assert stage.metrics["eval_full_loss"] == pytest.approx(stage.metrics["eval_loss"], rel=1e-5), (
            "the submodel is the model: nothing is lost"
        )
    sent = [stage.totals["bytes"] for stage in trainer.stages]
    assert sent[0] * 2.9 < sent[1] < sent[2]
    flops = [stage.totals["flops"] / stage.totals["tokens"] for stage in trainer.stages]
    if end == "last":  # no gradient below
        assert flops[0] < flops[1] < flops[2]
    for point in ("checkpoint-1", "checkpoint-3", "stage-1"):
        resumed = make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / point, **options)
        resumed.train(resume_from_checkpoint=str(folder / point))
        assert_equal(final_adapter(trainer), final_adapter(resumed))
    model = load_submodel(tiny_llama(), folder, stage=1)
    assert {layer_of(key) for key, _ in model.named_parameters() if "lora_A" in key} == expected[0]


def test_nothing_is_kept_of_layers_below_all_adapters(make_trainer):
    trainer = make_trainer(stage_layers=None, adapter_layers=[1, 4], stage_rounds=[1], gradient_accumulation_steps=1)
    found, training_step = [], trainer.training_step

    def watched(model, *args, **kwargs):
        layers, has_gradient = find_layer_stack(trainer.model.get_base_model()).layers, []
        handles = [
            layer.register_forward_hook(lambda layer, args, output: has_gradient.append(output.requires_grad))
            for layer in layers
        ]
        try:
            return training_step(model, *args, **kwargs)
        finally:
            found.append(has_gradient)
            for handle in handles:
                handle.remove()

    trainer.training_step = watched
    trainer.train()
    assert found[0] == [False, False, False, True]
    assert found[-1] == [True] * 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"stage_layers": [2, 4]}, "all layers compute in every stage"),
        ({"distillation_steps": 2}, "nothing is lost"),
        ({"federated_method": "flora"}, "use another method"),
        ({"peft_config": lora(target_modules=["q_proj", "embed_tokens"])}, "leave them out of `target_modules`"),
        ({"peft_config": lora(layers_to_transform=[0], target_modules=["q_proj"])}, "both say which layers"),
        ({"peft_config": lora(target_modules=".*q_proj")}, "use names"),
        ({"peft_config": IA3Config(task_type="CAUSAL_LM", **IA3)}, "use a `LoraConfig`"),
        ({"adapter_layers": [2, 2, 4]}, "adapter_layers=.* must increase"),
        ({"adapter_layers": [2, 3]}, "end at the model's 4 layers"),
    ],
)
def test_adapter_stages_that_cannot_be(make_trainer, options, why):
    with pytest.raises(ValueError, match=why):
        make_trainer(**{"stage_layers": [4], "adapter_layers": [2, 4]} | options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fusion": "anchor"}, 'set fusion="bridge"'),
        ({"grouping": "deconfliction"}, 'set grouping="bridged"'),
        ({"transfer": "broadcast"}, 'set transfer="anchor"'),
        ({"calibration_dataset": None}, "pass `calibration_dataset`"),
        ({"stage_layers": [4]}, "nothing is left out"),
        ({"grouping": "even", "model": tiny_model("gemma2", 4)}, 'only "bridged" groups follow'),
    ],
)
def test_bridges_that_cannot_be(make_trainer, options, why):
    with pytest.raises(ValueError, match=why):
        make_trainer(**BRIDGED | options)
