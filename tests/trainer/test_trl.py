"""TRL's trainers with rounds and stages."""

import sys

import pytest
import torch
from conftest import ANCHORS, lora, tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed

import hf_devft
from hf_devft.embedded import task_dataset
from hf_devft.embedded.families import preference_pairs
from hf_devft.run.plan import plan_run


trl = pytest.importorskip("trl")
from hf_devft.trainer.trl import DevFTDPOConfig, DevFTDPOTrainer, DevFTSFTConfig, DevFTSFTTrainer  # noqa: E402


def options(**kwargs) -> dict:
    defaults = {
        "stage_layers": [2, 4], "stage_rounds": [2], "num_clients": 4, "local_steps": 2, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return defaults | kwargs


@pytest.mark.parametrize(("init", "rules"), [(True, {}), ("pissa", ANCHORS)])
def test_sft_trains_submodels_and_loads_with_plain_peft(tmp_path, tokenizer, init, rules):
    rows = task_dataset(60, seed=0)
    trainer = DevFTSFTTrainer(
        tiny_llama(), DevFTSFTConfig(str(tmp_path), **options(max_length=64, **rules)),
        peft_config=lora(init_lora_weights=init), train_dataset=rows, eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    first, last = trainer.stages
    assert first.metrics["eval_full_mean_token_accuracy"] >= 0
    assert last.metrics["eval_full_loss"] < trainer.state.log_history[0].get("loss", 1e9)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert trainer.ledger.rounds[0].flops < trainer.ledger.rounds[-1].flops, "the first stage is of two layers"

    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits
        torch.testing.assert_close(loaded, trainer.model.eval()(tokens).logits)


def test_a_submodel_runs_its_own_layers_without_the_fused_head(tmp_path, tokenizer):
    """TRL patches `forward`; a copy of the patch would run the full base."""
    rows = task_dataset(40, seed=0)
    trainer = DevFTSFTTrainer(
        tiny_llama(), DevFTSFTConfig(str(tmp_path), **options(max_length=64, stage_rounds=[1])), peft_config=lora(),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    depths = []

    class Watch(trl.trainer.sft_trainer.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            layers = []
            hooks = [
                layer.register_forward_hook(lambda *_: layers.append(1))
                for layer in model.get_base_model().model.layers
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
            depths.append(len(layers))
            for hook in hooks:
                hook.remove()

    trainer.add_callback(Watch())
    trainer.train()
    assert depths == [2, 4]


def test_packing_never_mixes_clients(tmp_path, tokenizer):
    words = {"north": "snow", "south": "sun"}
    clients = {
        name: Dataset.from_dict({"text": [f"{word} " * count for count in range(1, 9)]})
        for name, word in words.items()
    }
    args = DevFTSFTConfig(
        str(tmp_path), **options(max_length=16, packing=True, packing_strategy="wrapped", num_clients=None)
    )
    trainer = DevFTSFTTrainer(
        tiny_llama(), args, peft_config=lora(), train_dataset=clients, processing_class=tokenizer
    )
    assert len(trainer.train_dataset) < 16, "rows are packed"
    for name, rows in trainer.clients.rows.items():
        (other,) = set(words.values()) - {words[name]}
        text = "".join(tokenizer.batch_decode(trainer.train_dataset.select(rows)["input_ids"][:]))
        assert words[name] in text
        assert other not in text
    trainer.train()


def test_rows_that_trl_drops_leave_the_others_with_their_clients(tmp_path, tokenizer):
    long = {"prompt": ["word " * 50, "a:"], "completion": [" x", " y"]}
    clients = {"one": Dataset.from_dict(long), "two": Dataset.from_dict({"prompt": ["b:"], "completion": [" z"]})}
    args = DevFTSFTConfig(str(tmp_path), **options(max_length=16, num_clients=None))
    trainer = DevFTSFTTrainer(
        tiny_llama(), args, peft_config=lora(), train_dataset=clients, processing_class=tokenizer
    )
    kept = {name: len(rows) for name, rows in trainer.clients.rows.items()}
    assert kept == {"one": 1, "two": 1}
    assert "y" in tokenizer.decode(trainer.train_dataset[int(trainer.clients.rows["one"][0])]["input_ids"])


def test_an_evaluation_set_may_have_any_name(tmp_path, tokenizer):
    rows = task_dataset(40, seed=0)
    trainer = DevFTSFTTrainer(
        tiny_llama(), DevFTSFTConfig(str(tmp_path), **options(max_length=64)), peft_config=lora(), train_dataset=rows,
        eval_dataset={"train": rows.select(range(3)), "test": rows.select(range(3))}, processing_class=tokenizer,
    )  # fmt: skip
    assert sum(map(len, trainer.clients.rows.values())) == 40


def test_sft_says_what_its_losses_do_not_see(tmp_path, tokenizer):
    for change, message in (({"temporary_head": True}, "weights of the head"), ({"grouping": "calibrated"}, "TRL")):
        with pytest.raises(ValueError, match=message):
            DevFTSFTTrainer(
                tiny_llama(), DevFTSFTConfig(str(tmp_path), **options(**change)), peft_config=lora(),
                train_dataset=task_dataset(8), processing_class=tokenizer,
            )  # fmt: skip


def test_dpo_raises_the_reward_margin_at_each_stage(tmp_path, tokenizer):
    set_seed(0)
    pairs = preference_pairs(task_dataset(80, seed=0))
    args = options(stage_layers=[4, 16], stage_rounds=[3], learning_rate=1e-3, max_length=64, eval_strategy="epoch")
    trainer = DevFTDPOTrainer(
        "embedded",
        DevFTDPOConfig(str(tmp_path), **args),
        peft_config=lora(),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(32)),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [0.0, *(stage.metrics["eval_full_rewards/margins"] for stage in trainer.stages)]
    assert margins[0] < margins[1] < margins[2]
    assert trainer.stages[0].metrics["eval_rewards/margins"] > 0.02, "of the submodel, against itself untrained"


def test_a_private_run_says_nothing_of_its_rows(tmp_path, tokenizer):
    """TRL adds its own metrics to what is logged."""
    args = options(dp_noise_multiplier=1.0, dp_clipping_norm=1.0, dp_delta=0.01, logging_steps=1, max_length=64)
    trainer = DevFTSFTTrainer(
        tiny_llama(), DevFTSFTConfig(str(tmp_path), **args), peft_config=lora(), train_dataset=task_dataset(60),
        eval_dataset=task_dataset(8, split="test"), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert not any("num_tokens" in name for stage in trainer.stages for name in stage.metrics)
    logged = {name for row in trainer.state.log_history for name in row if not name.startswith("eval_full_")}
    assert logged <= {"epsilon", "learning_rate", "stage", "bytes", "epoch", "step", "train_runtime",
                      "train_samples_per_second", "train_steps_per_second"}  # fmt: skip
    assert "epsilon" in logged


def test_dpo_weighs_pairs(tmp_path, tokenizer):
    args = options(stage_rounds=[1], max_length=64, use_weighting=True)
    trainer = DevFTDPOTrainer(
        tiny_llama(), DevFTDPOConfig(str(tmp_path), **args), peft_config=lora(),
        train_dataset=preference_pairs(task_dataset(40)), processing_class=tokenizer,
    )  # fmt: skip
    plan = plan_run(trainer.args, tiny_llama(), lora(), trainer="dpo")
    trainer.train()
    assert not any(record.dropped for record in trainer.ledger.rounds)
    for stage, planned in zip(trainer.stages, plan.stages, strict=True):
        assert planned.tokens == planned.rounds * 2 * 2 * (2 * 4) * 64, "two clients, two steps, four pairs"
        cost = stage.totals["flops"] / stage.totals["tokens"]
        assert cost == pytest.approx(planned.flops / planned.tokens, rel=0.01), "with the reference's pass"


def test_what_a_method_freezes_stays_frozen_beside_a_reference(tmp_path, tokenizer):
    """For which PEFT turns the adapter off, and all of it on again."""
    args = DevFTDPOConfig(
        str(tmp_path), **options(federated_method="ffa_lora", stage_layers=[4], stage_rounds=[1], local_steps=4)
    )
    pairs = preference_pairs(task_dataset(40, seed=0))
    trainer = DevFTDPOTrainer(tiny_llama(), args, peft_config=lora(), train_dataset=pairs, processing_class=tokenizer)
    changes, start = [], {}

    original = trainer.training_step

    def step(model, *rest, **kwargs):
        loss = original(model, *rest, **kwargs)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                start.setdefault(name, parameter.detach().clone())
                changes.append(not torch.equal(parameter, start[name]) or parameter.grad is not None)
        return loss

    trainer.training_step = step
    trainer.train()
    assert changes
    assert not any(changes)


def test_an_adapter_on_weights_that_peft_has_changed_is_refused(tmp_path, tokenizer):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights="pissa"))
    rows = task_dataset(8)
    with pytest.raises(ValueError, match="pass the plain base"):
        DevFTSFTTrainer(model, DevFTSFTConfig(str(tmp_path), **options(**ANCHORS)), train_dataset=rows,
                        processing_class=tokenizer)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"precompute_ref_log_probs": True}, "each stage has its own"),
    ({"client_placement": "data_parallel"}, "one process"),
    ({"auto_find_batch_size": True}, "a batch of pairs cannot be cut"),
    ({"grouping": "calibrated"}, "another rule"),
    ({"init_lora_weights": "olora"}, "no reference"),
    ({"federated_method": "flora"}, "the base is its reference, and must stay"),
])  # fmt: skip
def test_what_dpo_cannot_do_is_said_first(tmp_path, tokenizer, change, message):
    adapter = lora(init_lora_weights=change.get("init_lora_weights", True))
    change = {name: value for name, value in change.items() if name != "init_lora_weights"}
    with pytest.raises(ValueError, match=message):
        DevFTDPOTrainer(
            tiny_llama(), DevFTDPOConfig(str(tmp_path), **options(**change)), peft_config=adapter,
            train_dataset=preference_pairs(task_dataset(8)), processing_class=tokenizer,
        )  # fmt: skip


def test_without_trl_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hf_devft.trainer.trl")
    monkeypatch.delattr(hf_devft.trainer, "trl")
    with pytest.raises(ImportError, match=r"pip install 'hf-devft\[trl\]'"):
        hf_devft.DevFTSFTTrainer  # noqa: B018
