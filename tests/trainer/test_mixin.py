import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CopyAtSaves, FirstIsBest, config, lora, resume_after_stages, tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_devft import DevFTMixin, DevFTTrainer, StageConfig
from hf_devft.embedded import task_dataset
from hf_devft.federation.batches import client_batches
from hf_devft.federation.partition import partition_dataset
from hf_devft.federation.rounds import QuorumError
from hf_devft.federation.sampling import client_seed, sample_clients
from hf_devft.models.adapter import adapter_state
from hf_devft.stages import FUSIONS
from hf_devft.tasks.data import tokenize
from hf_devft.trainer import session
from hf_devft.trainer.resuming import starting_point


def final_adapter(trainer) -> dict[str, torch.Tensor]:
    return load_file(f"{trainer.args.output_dir}/adapter_model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def clockless(ledger) -> list[tuple]:
    return [(r.round, r.clients, r.bytes_up, r.loss) for r in ledger.rounds]


# --- the run ------------------------------------------------------------------------------------------------


def test_a_run_trains_every_stage_and_writes_it(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.epoch == 2
    stages = [StageConfig.from_pretrained(trainer.args.output_dir, subfolder=f"stage-{n}") for n in (1, 2)]
    assert [stage.num_layers for stage in stages] == [2, 4]
    assert [stage.rounds_done for stage in stages] == [2, 2]
    assert stages[1].groups == [[0], [1], [2], [3]]
    assert all(math.isfinite(stage.metrics["eval_full_loss"]) for stage in stages)
    assert stages[1].metrics["eval_full_loss"] == pytest.approx(stages[1].metrics["eval_loss"])
    assert StageConfig.from_pretrained(trainer.args.output_dir) == stages[1]


def test_losses_fall(make_trainer, eval_tasks):
    trainer = make_trainer(
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1, local_steps=5, stage_rounds=[5]
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])  # which has sums from the start
def test_one_stage_of_full_depth_is_plain_fedit_bit_for_bit(make_trainer, tasks, tokenizer, tmp_path, optim):
    """Against a loop that knows nothing of stages, buffers or the Trainer's own loop; but for the rounding of a loss
    that leaves out the logits that it does not need."""

    class AllLogits(DevFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainers = [
        make_trainer(
            cls=cls, output_dir=tmp_path / cls.__name__, stage_layers=[4], stage_rounds=[3], num_clients=3, optim=optim
        )
        for cls in (AllLogits, DevFTTrainer)
    ]
    for trainer in trainers:
        trainer.train()
    args = trainers[0].args

    base = tiny_llama()
    set_seed(args.seed)
    model = get_peft_model(base, lora()).train()
    clients = partition_dataset(tasks, "iid", 3, seed=args.seed)
    rows = list(clients.rows.values())
    dataset = tokenize(clients.dataset, tokenizer, args.max_length).select_columns(["input_ids", "labels"])
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    for round_index in range(3):
        start = [parameter.detach().clone() for parameter in parameters]
        total, examples = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters], 0
        for client in sample_clients(range(3), 2, args.seed, round_index):
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data.copy_(value)
            optimizer = optimizer_class(parameters, weight_decay=0.0, **options)
            batches = client_batches(rows[client], 4, False, client_seed(args.seed, round_index, client))
            for _ in range(args.local_steps):
                batch = collate([dataset[index] for index in next(batches)])
                count = (batch["labels"][:, 1:] != -100).sum()
                model(**batch, num_items_in_batch=count).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            for sum_, parameter in zip(total, parameters, strict=True):
                sum_.add_(parameter.detach(), alpha=len(rows[client]))
            examples += len(rows[client])
        for parameter, sum_ in zip(parameters, total, strict=True):
            parameter.data.copy_((sum_ / examples).float())
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert_equal(final_adapter(trainers[0]), expected)
    for key, tensor in final_adapter(trainers[1]).items():
        assert (tensor - expected[key]).norm() <= 1e-3 * expected[key].norm()


def test_nothing_is_measured_twice(make_trainer, eval_tasks):
    """At the start, and in the last stage, the submodel is the full model."""
    measured = []

    class Watched(DevFTTrainer):
        def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
            measured.append(metric_key_prefix)
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    options = {"eval_dataset": eval_tasks, "eval_strategy": "epoch", "eval_on_start": True}
    trainer = make_trainer(cls=Watched, **options)
    trainer.train()
    assert measured == ["eval", "eval", "eval_full", "eval"]
    last = trainer.stages[-1].metrics
    assert last["eval_full_loss"] == last["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.run.start_metrics["eval_full_loss"] == trainer.state.log_history[0]["eval_loss"]


def test_whoever_has_the_trainers_model_gets_all_logits(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset=eval_tasks)
    trainer.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert trainer.model(input_ids=ids, labels=ids).logits.shape == (1, 4, trainer.model.config.vocab_size)
    predicted = trainer.predict(trainer.eval_dataset).predictions
    assert predicted.shape[0] == len(trainer.eval_dataset)
    assert predicted.shape[-1] == trainer.model.config.vocab_size


def test_rows_of_like_length_share_batches(make_trainer):
    losses = []
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(train_sampling_strategy=strategy)
        trainer.train()
        losses.append([record.loss for record in trainer.ledger.rounds])
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"train_sampling_strategy='sequential' is unknown.*random, group_by_length"):
        make_trainer(train_sampling_strategy="sequential")


def test_same_seed_same_run(make_trainer, tmp_path):
    runs = [make_trainer(output_dir=tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    adapters = []
    for trainer in runs:
        trainer.train()
        adapters.append(final_adapter(trainer))
    assert_equal(adapters[0], adapters[1])
    assert any(not torch.equal(adapters[0][key], adapters[2][key]) for key in adapters[0])


def test_the_base_is_untouched(make_trainer):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model=model, fusion="differential")
    trainer.train()
    assert_equal(trainer.model.unload().state_dict(), before)


@pytest.mark.parametrize("rules", [
    {"grouping": "even", "fusion": "mean", "transfer": "split", "adapter_fusion": "sum"},
    {"grouping": "random", "fusion": "sum", "transfer": "anchor", "adapter_fusion": "anchor"},
    {"grouping": "calibrated", "fusion": "anchor", "transfer": "anchor"},
    {"grouping": "calibrated", "label_smoothing_factor": 0.1},
])  # fmt: skip
def test_every_rule_runs_by_config_alone(make_trainer, eval_tasks, rules):
    trainer = make_trainer(eval_dataset=eval_tasks, stage_layers=[2, 3, 4], stage_rounds=[1], **rules)
    trainer.train()
    assert trainer.stages[-1].rounds_done == 1
    assert all(torch.isfinite(tensor).all() for tensor in final_adapter(trainer).values())


@pytest.mark.parametrize("options", [
    {"activation_checkpointing": True},
    {"bf16": True},
    {"gradient_accumulation_steps": 2},
    {"dataloader_num_workers": 1},
    {"label_smoothing_factor": 0.1},
    {"data_seed": 7},
    {"torch_compile": True, "torch_compile_backend": "eager"},
    {"auto_find_batch_size": True},
    {"client_placement": "data_parallel"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch", "eval_on_start": True},
    {"predict_with_generate": True, "generation_max_new_tokens": 4, "max_eval_samples": 4},
])  # fmt: skip
def test_options_of_the_trainer_work(make_trainer, eval_tasks, options):
    trainer = make_trainer(eval_dataset=eval_tasks, **options)
    result = trainer.train()
    assert result.global_step == 4
    assert math.isfinite(result.training_loss)
    if "label_smoothing_factor" in options:
        plain = make_trainer(output_dir=f"{trainer.args.output_dir}-plain")
        plain.train()
        assert trainer.ledger.rounds[0].loss != pytest.approx(plain.ledger.rounds[0].loss, rel=1e-6)
    if options.get("predict_with_generate"):
        assert 0 <= trainer.stages[-1].metrics["eval_full_exact_match"] <= 1


def test_submodels_checkpoint_their_activations(make_trainer):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.get_base_model().is_activation_checkpointing)

    make_trainer(activation_checkpointing=True, callbacks=[Look()]).train()
    assert seen == [True] * 4


@pytest.mark.parametrize("together", [1, 2])
def test_tokens_padding_and_flops_are_counted(make_trainer, together):
    for counted in ("all", "non_padding"):
        trainer = make_trainer(include_num_input_tokens_seen=counted, clients_per_batch=together)
        result = trainer.train()
        totals = trainer.ledger.totals()
        padding = totals["padding"] if counted == "non_padding" else 0
        assert trainer.state.num_input_tokens_seen == totals["tokens"] - padding > 0
        assert 0 < totals["padding"] < totals["tokens"]
        assert result.metrics["total_flos"] == totals["flops"]


def test_a_loss_of_one_s_own_is_not_taken_for_a_mean_over_tokens(make_trainer):
    class OwnLoss(DevFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match=r"no mean over all tokens .* set `loss_is_scaled_for_ga = True`"):
        make_trainer(cls=OwnLoss, auto_find_batch_size=True)


def test_a_step_that_does_not_fit_is_taken_in_pieces(make_trainer, tmp_path):
    class Small(DevFTTrainer):
        """A trainer on a device that holds two rows."""

        loss_is_scaled_for_ga = True  # it is the model's own

        def compute_loss(self, model, inputs, **kwargs):
            if model.training and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, **kwargs)

    options = {"per_device_train_batch_size": 7, "stage_layers": [4], "optim": "sgd"}
    large = make_trainer(output_dir=tmp_path / "large", **options)
    small = make_trainer(cls=Small, auto_find_batch_size=True, **options)
    for trainer in (large, small):
        trainer.train()
    for key, tensor in final_adapter(large).items():
        torch.testing.assert_close(final_adapter(small)[key], tensor, atol=1e-6, rtol=1e-4)
    assert not any(record.dropped for record in small.ledger.rounds)


def test_schedules_and_stage_rates_give_the_rounds_rate(make_trainer):
    trainer = make_trainer(lr_scheduler_type="linear", learning_rate=1e-2, stage_learning_rates=[1e-2, 4e-2])
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5 * 4e-2, 0.25 * 4e-2])


def test_no_round_is_spent_on_a_rate_of_zero(make_trainer):
    trainer = make_trainer(lr_scheduler_type="linear", learning_rate=1e-2, warmup_steps=2, stage_rounds=[3])
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.5e-2, 1e-2, 0.8e-2, 0.6e-2, 0.4e-2, 0.2e-2])


def test_data_seed_orders_the_rows_of_the_same_clients(make_trainer):
    class Spy(DevFTTrainer):
        def __init__(self, *args, **kwargs):
            self.seen = []
            super().__init__(*args, **kwargs)

        def get_batch_samples(self, *args):
            self.seen.append(super().get_batch_samples(*args))
            return self.seen[-1]

    a, b = (make_trainer(cls=Spy, data_seed=seed, stage_layers=[4], stage_rounds=[1]) for seed in (None, 7))
    for trainer in (a, b):
        trainer.train()
    assert a.ledger.rounds[0].clients == b.ledger.rounds[0].clients
    texts = []
    for trainer in (a, b):
        names = trainer.ledger.rounds[0].clients
        rows = trainer.train_dataset.select([row for name in names for row in trainer.clients.rows[name]])
        owned = set(map(tuple, rows["input_ids"]))
        batches = [samples[0]["input_ids"] for samples, _ in trainer.seen]
        texts.append([tuple(t for t in row.tolist() if t != 1) for batch in batches for row in batch])
        assert set(texts[-1]) <= owned
    assert texts[0] != texts[1]


def test_max_steps_limits_the_rounds(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    assert [stage.rounds_done for stage in trainer.stages] == [2, 1]


def test_the_ledger_counts_what_is_sent(make_trainer):
    trainer = make_trainer()
    trainer.train()
    first, last = trainer.ledger.totals(1), trainer.ledger.totals(2)
    size = sum(tensor.nbytes for tensor in final_adapter(trainer).values())
    assert last["bytes_up"] == last["bytes_down"] == 2 * 2 * size
    assert first["bytes"] == last["bytes"] / 2
    assert 0 < first["flops"] < last["flops"]
    saved = json.loads((Path(trainer.args.output_dir) / "ledger.json").read_text())
    assert [record["round"] for record in saved] == [1, 2, 3, 4]


# --- the Trainer's hooks hold inside clients -------------------------------------------------------------------


def test_overridden_hooks_hold_inside_clients(make_trainer):
    calls = []

    class Custom(DevFTTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append("loss")
            return super().compute_loss(*args, **kwargs)

        def create_optimizer(self, model=None):
            calls.append("optimizer")
            self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
            return self.optimizer

    trainer = make_trainer(cls=Custom)
    trainer.train()
    assert calls.count("loss") == 4 * 2 * 2
    assert calls.count("optimizer") == 2, "one optimiser per stage, none per client"


def test_the_federated_part_goes_on_any_trainer(tmp_path, tasks, tokenizer):
    class Doubling(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class Federated(DevFTMixin, Doubling):
        pass

    trainer = Federated(
        get_peft_model(tiny_llama(), lora()),
        config(tmp_path),
        train_dataset=tokenize(tasks, tokenizer, 64),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.stages[-1].rounds_done == 2


def test_callbacks_count_rounds(make_trainer):
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(("round", state.global_step))

        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append(("stage", state.epoch))

    make_trainer(callbacks=[Count()]).train()
    assert seen == [("round", 1), ("round", 2), ("stage", 1), ("round", 3), ("round", 4), ("stage", 2)]


def test_a_callback_that_stops_the_run_leaves_a_finished_stage(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 1
    assert StageConfig.from_pretrained(trainer.args.output_dir).rounds_done == 1


def test_early_stopping_ends_the_stage(make_trainer, eval_tasks):
    trainer = make_trainer(
        eval_dataset=eval_tasks,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        stage_rounds=[4],
    )
    trainer.train()
    assert [stage.rounds_done for stage in trainer.stages] == [2, 2]


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_round_is_handed_on(make_trainer, eval_tasks, save_only_model):
    trainer = make_trainer(
        eval_dataset=eval_tasks,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best round is not the last
        save_only_model=save_only_model,
        stage_layers=[4],
        stage_rounds=[3],
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert max(losses) > losses[-1]
    assert trainer.stages[0].metrics["eval_full_loss"] == pytest.approx(max(losses), rel=1e-5)
    assert trainer.stages[0].metrics["eval_loss"] == max(losses)


def test_a_round_that_is_not_saved_is_not_the_best(make_trainer, eval_tasks):
    trainer = make_trainer(
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, stage_layers=[4],
        stage_rounds=[5],
    )  # fmt: skip
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert max(losses) == losses[0], "of a round that is not saved"
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.stages[0].metrics["eval_loss"] == losses[1]
    assert trainer.stages[0].metrics["eval_full_loss"] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_that_is_asked_for_is_written_where_only_the_best_is_saved(make_trainer, eval_tasks):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save |= state.global_step == 2

    trainer = make_trainer(
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1, save_strategy="best", stage_layers=[4],
        metric_for_best_model="loss", greater_is_better=True, stage_rounds=[3], callbacks=[Ask()],
    )  # fmt: skip
    trainer.train()
    saved = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"], "the first round's loss is the largest"


@pytest.mark.parametrize(("stopping", "scheduler"), [(True, "constant"), (False, "reduce_lr_on_plateau")])
def test_several_sets_stop_a_stage_and_lower_the_rate_by_their_mean(make_trainer, stopping, scheduler):
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    trainer = make_trainer(
        client_eval_size=0.2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="loss", load_best_model_at_end=True, stage_rounds=[4], lr_scheduler_type=scheduler,
        callbacks=[stop] if stopping else None,
    )  # fmt: skip
    trainer.train()
    assert [stage.rounds_done for stage in trainer.stages] == ([2, 2] if stopping else [4, 4])
    assert {"eval_loss", "eval_worst_loss"} <= trainer.evaluate().keys()


def test_patience_counts_an_evaluation_of_several_sets_once(make_trainer, caplog):
    stop = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
    trainer = make_trainer(
        client_eval_size=0.2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="eval_client-0_loss", load_best_model_at_end=True, stage_rounds=[5], callbacks=[stop],
    )  # fmt: skip
    trainer.train()
    assert [stage.rounds_done for stage in trainer.stages] == [3, 3], (
        "the first one is the best, then two that are not"
    )
    assert "early stopping is disabled" not in caplog.text


def test_a_stage_that_has_saved_nothing_hands_on_what_was_measured_last(make_trainer, eval_tasks):
    trainer = make_trainer(
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, stage_rounds=[2],
    )  # fmt: skip
    trainer.train()
    measured = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.stages[0].metrics["eval_loss"] == measured[1], "of the second round, the stage's last"


def test_a_save_that_is_asked_for_between_evaluations_is_one(make_trainer, eval_tasks, monkeypatch):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save |= state.global_step == 1

    saved = []
    save = DevFTTrainer._save_checkpoint
    monkeypatch.setattr(
        DevFTTrainer, "_save_checkpoint", lambda self, *rest: (saved.append(self.state.global_step), save(self, *rest))
    )
    make_trainer(
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=2, save_strategy="best", stage_rounds=[2],
        metric_for_best_model="loss", callbacks=[Asks()],
    ).train()  # fmt: skip
    assert saved.count(1) == 1


def test_the_last_state_is_the_one_of_most_rounds(make_trainer, tmp_path):
    """A stage that is over, not an older checkpoint of it, nor one that has no state to go on from."""
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run"
    assert starting_point(trainer.args, "last") == str(folder / "checkpoint-4"), "of equals the checkpoint"
    for name in ("checkpoint-3", "checkpoint-4", "stage-2"):
        shutil.rmtree(folder / name)
    assert starting_point(trainer.args, "last") == str(folder / "checkpoint-2")
    (folder / "checkpoint-2" / "devft_state.json").unlink()
    assert starting_point(trainer.args, "last") == str(folder / "stage-1")


# --- stops, resumes, failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["broadcast", "split"])
def test_resume_gives_the_same_adapter_bit_for_bit(make_trainer, tmp_path, transfer):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", "transfer": transfer}
    whole = make_trainer(output_dir=tmp_path / "whole", callbacks=[CopyAtSaves()], **options)
    whole.train()
    for stopped_at in (1, 2, 3):
        resumed = make_trainer(output_dir=tmp_path / f"whole-at-{stopped_at}", **options)
        resumed.train(resume_from_checkpoint=True)
        assert_equal(final_adapter(resumed), final_adapter(whole))
        assert clockless(resumed.ledger) == clockless(whole.ledger)


def test_a_finished_stages_folder_is_where_a_run_can_go_on(make_trainer, tmp_path):
    whole, resumed = resume_after_stages(make_trainer, tmp_path, lr_scheduler_type="cosine", transfer="split")
    for stage, trainer in resumed.items():
        assert_equal(final_adapter(trainer), final_adapter(whole))
        assert clockless(trainer.ledger) == clockless(whole.ledger)
        assert not (Path(trainer.args.output_dir) / f"stage-{stage}").exists()
    with pytest.raises(ValueError, match="nothing is left to do"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "stage-3"))


@pytest.mark.parametrize("resume", [None, True])
def test_a_trainer_goes_on_after_an_interruption(make_trainer, tmp_path, resume):
    class InterruptOnce(TrainerCallback):
        fired = False

        def on_save(self, args, state, control, **kwargs):
            if not self.fired:
                self.fired = True
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(callbacks=[InterruptOnce()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=resume)
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    assert_equal(final_adapter(trainer), final_adapter(whole))


@pytest.mark.parametrize("where", ["hf_devft.trainer.model_in_use.make_engine", "hf_devft.run.report.RunReport.write"])
def test_an_interruption_while_a_stage_is_built_or_finished(make_trainer, tmp_path, monkeypatch, where):
    trainer = make_trainer()
    start = adapter_state(trainer.model)
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "adapter_model.safetensors").keys() == start.keys()
    trainer.train()
    assert trainer.stages[-1].rounds_done == 2


def test_running_out_of_memory_in_an_evaluation_does_not_start_the_run_anew(make_trainer, eval_tasks, monkeypatch):
    trainer = make_trainer(eval_dataset=eval_tasks, auto_find_batch_size=True)

    def fail(*args):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(session, "evaluate_full_depth", fail)
    with pytest.raises(RuntimeError, match="per_device_eval_batch_size"):
        trainer.train()
    assert [record.round for record in trainer.ledger.rounds] == [1, 2]


def test_a_base_by_name_can_be_evaluated_before_it_is_trained(tmp_path, tasks, eval_tasks, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "models" / "tiny")
    losses = []
    for model in (str(tmp_path / "models"), tiny_llama()):
        options = {"model_init_kwargs": {"subfolder": "tiny"}} if isinstance(model, str) else {}
        trainer = DevFTTrainer(
            model,
            config(tmp_path / "run", **options),
            peft_config=lora(),
            train_dataset=tasks,
            eval_dataset=eval_tasks,
            processing_class=tokenizer,
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # the adapter may be another one by now
                parameter.data.fill_(0.1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_checkpoint_loads_as_a_plain_adapter(make_trainer):
    class Noting(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 1:
                saved.update(load_file(f"{args.output_dir}/checkpoint-1/adapter_model.safetensors"))

    saved: dict = {}
    trainer = make_trainer(save_strategy="steps", save_steps=1, callbacks=[Noting()])
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_llama(), f"{trainer.args.output_dir}/checkpoint-1")
    assert any(tensor.any() for key, tensor in saved.items() if "lora_B" in key), "trained"
    torch.testing.assert_close(adapter_state(loaded), saved, rtol=0, atol=0)


def test_a_checkpoint_of_another_run_is_refused(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    for other in ({"stage_layers": [3, 4]}, {"fusion": "mean"}, {"seed": 1}, {"num_clients": 5}):
        with pytest.raises(ValueError, match=f"is of a run with .*{next(iter(other)).removeprefix('num_')}"):
            make_trainer(**other).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_larger_rank_is_refused_not_cut(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    rank = trainer.model.peft_config["default"].r
    with pytest.raises(ValueError, match=rf"is of a run with lora_r {rank} \(now {rank // 2}\): resume with the same"):
        make_trainer(peft_config=lora(r=rank // 2)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"is of a run with use_rslora False \(now True\)"):
        make_trainer(peft_config=lora(use_rslora=True)).train(resume_from_checkpoint=True)


def test_a_run_that_goes_on_with_another_rate_and_more_rounds_says_so(make_trainer, caplog):
    make_trainer(save_strategy="steps", save_steps=1).train()
    folder = make_trainer().args.output_dir
    make_trainer(stage_rounds=[2, 3], learning_rate=1e-4).train(resume_from_checkpoint=f"{folder}/stage-1")
    (said,) = [record.message for record in caplog.records if "other options" in record.message]
    assert said.endswith("rounds 2 → 3 in stage 2, learning_rate 0.01 → 0.0001 in stage 2.")


def test_a_run_that_goes_on_saves_as_it_is_asked_now(make_trainer, tmp_path):
    make_trainer(save_strategy="epoch").train()
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/stage-1")
    assert (Path(trainer.args.output_dir) / "checkpoint-3").exists()


def test_a_run_that_goes_on_with_fewer_rounds_has_all_its_stages(make_trainer, tmp_path):
    options = {"stage_layers": [2, 3, 4], "save_strategy": "steps", "save_steps": 1}
    make_trainer(output_dir=tmp_path / "run", callbacks=[CopyAtSaves()], **options).train()
    resumed = make_trainer(output_dir=tmp_path / "run", stage_rounds=[1], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "stage-1"))
    assert [(stage.rounds, stage.rounds_done) for stage in resumed.stages] == [(2, 2), (1, 1), (1, 1)]
    assert StageConfig.from_pretrained(tmp_path / "run" / "stage-3").metrics is not None
    with pytest.raises(ValueError, match="has 2 rounds of stage 2, stage_rounds asks for 1: ask for as many"):
        make_trainer(stage_rounds=[1], **options).train(
            resume_from_checkpoint=str(tmp_path / "run-at-4" / "checkpoint-4")
        )


def test_checkpoints_of_later_rounds_than_one_resumes_from_are_told(make_trainer, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    trainer = make_trainer(**options)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert "checkpoint-3, checkpoint-4, stage-2 in" in caplog.text
    caplog.clear()
    make_trainer(**options).train(resume_from_checkpoint="last")
    assert "stay as they are" not in caplog.text


@pytest.mark.parametrize("folder", ["checkpoint-1", "stage-1"])
def test_a_run_that_has_had_its_last_round_has_no_more(make_trainer, tmp_path, folder):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(output_dir=tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / folder))
    assert clockless(resumed.ledger) == clockless(whole.ledger)
    assert_equal(adapter_state(resumed.model), adapter_state(whole.model))
    assert not (tmp_path / "again" / "stage-2").exists()


@pytest.mark.parametrize("folder", ["checkpoint-1", "stage-1"])
def test_a_checkpoint_with_another_adapter_is_refused(make_trainer, folder):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    path = Path(trainer.args.output_dir) / folder / "adapter_model.safetensors"
    save_file({key: tensor[..., :-1].clone() for key, tensor in load_file(path).items() if "lora_A" in key}, path)
    (path.parent / "checksums.json").unlink()
    with pytest.raises(ValueError, match="names or shapes differ"):
        make_trainer().train(resume_from_checkpoint=str(path.parent))


def test_an_interrupted_checkpoint_is_never_picked_up(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=1)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(trainer.run, "save_state", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        make_trainer(save_strategy="steps").train(resume_from_checkpoint=True)


class Poisoned(DevFTTrainer):
    """A trainer whose first `poisoned` local steps have a NaN loss."""

    poisoned = 2

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.poisoned -= self.model.training
        return loss * float("nan") if self.model.training and self.poisoned >= 0 else loss


def test_a_nan_update_is_left_out(make_trainer, caplog):
    trainer = make_trainer(cls=Poisoned)
    trainer.train()
    first = trainer.ledger.rounds[0]
    assert first.dropped == first.clients[:1]
    assert first.clients[0] in caplog.text
    assert all(not record.dropped for record in trainer.ledger.rounds[1:])
    assert all(torch.isfinite(tensor).all() for tensor in final_adapter(trainer).values())


def test_a_client_that_raises_is_left_out_and_the_next_one_gets_its_own_rows(make_trainer, tmp_path, caplog):
    class Ill(DevFTTrainer):
        """A trainer on which the first client of the first round fails in its second step."""

        steps = 0

        def compute_loss(self, *args, **kwargs):
            self.steps += 1
            if self.steps == 2:
                raise RuntimeError("no more disk")
            return super().compute_loss(*args, **kwargs)

    ill, healthy = make_trainer(cls=Ill), make_trainer(output_dir=tmp_path / "healthy")
    for trainer in (ill, healthy):
        trainer.train()
    first = ill.ledger.rounds[0]
    assert first.dropped == first.clients[:1]
    assert first.bytes_up == first.bytes_down / 2
    assert f"client {first.clients[0]} failed and was left out: RuntimeError: no more disk" in caplog.text
    # Round 2 starts from elsewhere, but with the same rows.
    assert ill.ledger.rounds[1].clients == healthy.ledger.rounds[1].clients
    assert ill.ledger.rounds[1].tokens == healthy.ledger.rounds[1].tokens


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_nothing_of_a_failed_client_stays(make_trainer, micro_batch):
    """Wherever in an accumulated step it fails, the next client learns the same."""
    updates = []

    class Ill(DevFTTrainer):
        seen, fails_at = 0, 0

        def compute_loss(self, *args, **kwargs):
            self.seen += 1
            if self.seen == self.fails_at:
                raise RuntimeError("no more disk")
            return super().compute_loss(*args, **kwargs)

    for fails_at in (1, micro_batch + 1):
        trainer = make_trainer(cls=Ill, gradient_accumulation_steps=3, stage_layers=[4], stage_rounds=[1])
        trainer.fails_at = fails_at
        trainer.train()
        assert len(trainer.ledger.rounds[0].dropped) == 1
        updates.append(final_adapter(trainer))
    assert_equal(*updates)


def test_clients_drop_out_by_config(make_trainer):
    trainer = make_trainer(client_dropout_rate=0.4, clients_per_round=3, stage_rounds=[5])
    trainer.train()
    dropped = [len(record.dropped) for record in trainer.ledger.rounds if record.attempts == 1]
    assert 0 < sum(dropped) < 3 * len(dropped)
    assert trainer.ledger.totals()["dropped_clients"] >= sum(dropped)


def test_a_round_below_its_quorum_is_tried_with_other_clients(make_trainer, caplog):
    trainer = make_trainer(client_dropout_rate=0.5, round_quorum=2, round_retries=20)
    trainer.train()
    retried = [record for record in trainer.ledger.rounds if record.attempts > 1]
    assert retried
    assert all(len(record.clients) == 2 * record.attempts for record in trainer.ledger.rounds)
    assert all(len(record.clients) - len(record.dropped) >= 2 for record in trainer.ledger.rounds)
    assert "2 are needed" in caplog.text


def test_a_round_without_any_finite_update_is_an_error(make_trainer):
    trainer = make_trainer(cls=Poisoned)
    trainer.poisoned = 99
    with pytest.raises(QuorumError, match="resume_from_checkpoint"):
        trainer.train()


def test_a_final_adapter_is_the_start_of_a_new_run(make_trainer, tmp_path, tasks, tokenizer):
    first = make_trainer()
    first.train()
    model = PeftModel.from_pretrained(tiny_llama(), first.args.output_dir)
    second = DevFTTrainer(
        model,
        config(tmp_path / "second", stage_layers=[4], learning_rate=1e-12),
        train_dataset=tasks,
        processing_class=tokenizer,
    )
    second.train()
    for key, tensor in final_adapter(second).items():
        torch.testing.assert_close(tensor, final_adapter(first)[key], atol=1e-6, rtol=0)


# --- data in the forms that users have -------------------------------------------------------------------------


def test_clients_given_as_datasets(make_trainer, tasks):
    clients = {"hospital": tasks.select(range(10)), "bank": tasks.select(range(10, 40))}
    trainer = make_trainer(train_dataset=clients, num_clients=None)
    trainer.train()
    assert trainer.ledger.rounds[0].clients == ["hospital", "bank"]


def test_clients_of_different_formats(make_trainer):
    clients = {
        "maths": Dataset.from_list([{"question": "1+1?", "answer": "2"}] * 4),
        "code": Dataset.from_list([{"instruction": "add", "output": "+"}] * 4),
    }
    rows = make_trainer(train_dataset=clients, num_clients=None).train_dataset
    assert rows["completion"][:] == [" 2"] * 4 + ["+"] * 4


def test_a_tokenizer_without_padding_token_pads_with_its_end(tmp_path, tasks, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    DevFTTrainer(
        tiny_llama(),
        config(tmp_path, stage_rounds=[1]),
        peft_config=lora(),
        train_dataset=tasks,
        processing_class=bare,
    ).train()
    assert bare.pad_token == bare.eos_token


def test_clients_of_a_partitioner(make_trainer):
    class Halves:
        """The interface of flwr-datasets' partitioners."""

        num_partitions = 2

        def load_partition(self, index: int) -> Dataset:
            return self.dataset.shard(2, index)

    trainer = make_trainer(partitioner=Halves(), num_clients=None)
    assert [len(rows) for rows in trainer.clients.rows.values()] == [60, 60]
    assert trainer.clients.partition == "Halves"


def test_several_evaluation_sets(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset={"a": eval_tasks, "b": eval_tasks}, eval_strategy="epoch")
    trainer.train()
    metrics = trainer.stages[-1].metrics
    assert metrics["eval_full_a_loss"] == metrics["eval_full_b_loss"] == metrics["eval_full_loss"]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_full_loss"])


def test_evaluate_and_save_after_training(make_trainer, eval_tasks, tmp_path):
    trainer = make_trainer(eval_dataset=eval_tasks)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.stages[-1].metrics["eval_full_loss"])
    trainer.save_model(str(tmp_path / "saved"))
    assert_equal(load_file(tmp_path / "saved" / "adapter_model.safetensors"), final_adapter(trainer))


# --- errors before any work is spent ----------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"stage_layers": [2, 8]}, "end at the model's 4 layers"),
    ({"stage_layers": [3]}, "end at the model's 4 layers"),
    ({"num_clients": None, "clients_per_round": 21}, "there are 20 clients"),
    ({"partition": "natural", "partition_column": "colour", "num_clients": None}, "'colour' is not in the dataset"),
    ({"num_clients": 500}, "more than the 120 rows to deal out"),
    ({"grouping": "calibrated"}, "calibration_dataset"),
    ({"predict_with_generate": True}, "eval_dataset"),
    ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "optimizers cannot be passed"),
    ({"model_init": tiny_llama}, "model_init"),
    ({"peft_config": lora(bias="all")}, "bias"),
    ({"train_dataset": {}, "num_clients": None}, "no client"),
    ({"train_dataset": [1, 2]}, "datasets.Dataset"),
    ({"train_dataset": Dataset.from_dict({"text": []})}, "train_dataset has no rows"),
    ({"eval_dataset": Dataset.from_dict({"text": ["a"] * 9}).to_iterable_dataset()}, "streaming dataset"),
    ({"train_dataset": Dataset.from_dict({"body": ["a"] * 9})}, "needs one of"),
])  # fmt: skip
def test_bad_input_is_refused_at_construction(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_an_empty_client_is_refused(make_trainer, tasks):
    clients = {"a": tasks.select(range(5)), "b": tasks.select([])}
    with pytest.raises(ValueError, match=r"no rows \(b\)"):
        make_trainer(train_dataset=clients, num_clients=None)


def test_an_adapter_of_another_base_says_so_and_its_base_is_not_loaded(make_trainer, tmp_path, caplog):
    for name in ("old", "new"):
        tiny_llama().save_pretrained(tmp_path / name)
    trainer = make_trainer(model=str(tmp_path / "old"), stage_layers=[4], stage_rounds=[1])
    trainer.train()
    adapter = trainer.args.output_dir
    make_trainer(model=str(tmp_path / "old"), peft_config=adapter)
    assert "was made on" not in caplog.text
    (tmp_path / "old" / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}')
    make_trainer(model=str(tmp_path / "new"), peft_config=adapter)
    assert f"was made on {tmp_path / 'old'}, and is put on {tmp_path / 'new'}" in caplog.text


class Rows(torch.utils.data.Dataset):
    """Evaluation rows that are no `datasets.Dataset`."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


def test_evaluation_rows_of_torch_will_do(make_trainer):
    trainer = make_trainer(eval_dataset=task_dataset(4))
    trainer.eval_dataset = Rows()
    trainer.train()
    assert trainer.stages[-1].metrics["eval_full_loss"] > 0


def test_another_config_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="args must be a DevFTConfig, not TrainingArguments"):
        DevFTTrainer(tiny_llama(), TrainingArguments(str(tmp_path)), peft_config=lora())


def test_a_fusion_rule_of_ones_own_runs(make_trainer, monkeypatch):
    monkeypatch.setitem(FUSIONS, "last", lambda anchor, others, size, beta: list(others)[-1])
    trainer = make_trainer(fusion="last", adapter_fusion="anchor", grouping="even")
    trainer.train()
    assert trainer.stages[0].fusion == "last"


def test_new_rows_are_encoded_to_be_evaluated_and_predicted(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset=eval_tasks, stage_rounds=[1])
    trainer.train()
    assert trainer.evaluate(eval_tasks)["eval_loss"] == trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(eval_tasks)
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_rows_without_labels_are_refused_unless_something_makes_them(make_trainer, tasks, tokenizer):
    rows = tokenize(tasks, tokenizer, 64).select_columns(["input_ids"])
    with pytest.raises(ValueError, match="have input_ids but no `labels`: add them"):
        make_trainer(train_dataset=rows)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    make_trainer(train_dataset=rows, data_collator=collator, stage_rounds=[1]).train()
    with pytest.raises(ValueError, match="makes labels, which rows of text are given here already"):
        make_trainer(data_collator=collator)


@pytest.mark.parametrize(("options", "said"), [
    ({"model": None}, "model is None: pass a model"),
    ({"model": None, "model_init": tiny_llama}, "model_init is not supported"),
])  # fmt: skip
def test_a_trainer_needs_a_model(tmp_path, tasks, options, said):
    with pytest.raises(ValueError, match=said):
        DevFTTrainer(args=config(tmp_path), peft_config=lora(), train_dataset=tasks, **options)


def test_callbacks_are_told_of_all_sets_together(make_trainer, eval_tasks):
    told = []

    class Watching(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            told.append(metrics)

    sets = {"a": eval_tasks.select(range(4)), "b": eval_tasks.select(range(4, 8))}
    trainer = make_trainer(eval_dataset=sets, callbacks=[Watching()])
    found = trainer.evaluate()
    assert [("eval_a_loss" in each, "eval_worst_loss" in each) for each in told] == [
        (True, False), (False, False), (True, True),
    ]  # fmt: skip
    assert told[-1] == found


def test_a_schedule_that_goes_by_a_metric_begins_anew_with_each_stage(make_trainer, eval_tasks):
    """Losses of two submodels cannot be compared."""

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = make_trainer(
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_dataset=eval_tasks, eval_strategy="steps", eval_steps=1, stage_layers=[2, 4], stage_rounds=[3],
        callbacks=[Worse()], learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 1e-2, 0.5e-2] * 2)


# The first round, of the highest loss, is the best.
KEEPS_BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    "stage_layers": [4], "stage_rounds": [3],
}  # fmt: skip


def test_a_best_round_whose_checkpoint_is_gone_is_not_claimed(make_trainer, eval_tasks, tmp_path, caplog):
    """What is handed on then is the last round, and its metrics."""
    options = KEEPS_BEST | {"eval_dataset": eval_tasks}
    make_trainer(**options, callbacks=[CopyAtSaves()]).train()
    folder = tmp_path / "run-at-2"
    shutil.rmtree(folder / "checkpoint-1")
    make_trainer(**options | {"stage_rounds": [1]}).train()  # another run, where the first has left it
    resumed = make_trainer(output_dir=folder, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "round 1, the best of its stage so far, has no checkpoint" in caplog.text
    losses = [row["eval_loss"] for row in resumed.state.log_history if "eval_loss" in row]
    assert resumed.stages[0].metrics["eval_loss"] == losses[2] < losses[0]
    assert resumed.stages[0].metrics["eval_full_loss"] == pytest.approx(losses[2], rel=1e-5)


def test_the_best_round_may_be_the_one_that_is_resumed_from(make_trainer, eval_tasks, tmp_path, caplog):
    """Whatever its folder is called now."""
    options = KEEPS_BEST | {"eval_dataset": eval_tasks}
    make_trainer(**options, callbacks=[CopyAtSaves()]).train()
    (tmp_path / "run-at-1" / "checkpoint-1").rename(tmp_path / "last-checkpoint")
    resumed = make_trainer(output_dir=tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "last-checkpoint"))
    assert "has no checkpoint" not in caplog.text
    losses = [row["eval_loss"] for row in resumed.state.log_history if "eval_loss" in row]
    assert resumed.stages[0].metrics["eval_loss"] == losses[0] > losses[2]
    assert resumed.stages[0].metrics["eval_full_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_that_goes_back_says_what_is_still_ahead(make_trainer, tmp_path, caplog):
    options = {"stage_layers": [2, 4], "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    make_trainer(**options).train()
    for checkpoint in (2, 3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{checkpoint}")
    args = make_trainer(**options).args
    starting_point(args, str(tmp_path / "run" / "checkpoint-1"))
    assert "stage-1, stage-2 in" in caplog.text
    caplog.clear()
    starting_point(args, str(tmp_path / "run" / "stage-1"))
    assert "stage-2 in" in caplog.text
    caplog.clear()
    starting_point(args, str(tmp_path / "run" / "stage-2"))
    assert not caplog.text


def test_a_run_that_goes_on_on_another_base_says_so(make_trainer, tmp_path, caplog):
    for name, seed in (("one", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
    options = {"stage_layers": [2, 4], "overwrite_output_dir": False}
    make_trainer(model=str(tmp_path / "one"), **options).train()
    make_trainer(model=str(tmp_path / "other"), **options).train(str(tmp_path / "run" / "stage-1"))
    assert f"was begun on {tmp_path}/one, and goes on on {tmp_path}/other" in caplog.text


def test_the_newest_checkpoint_is_kept_beside_the_best(make_trainer, eval_tasks, tmp_path):
    """To go on from within the stage, where transformers deletes it at the end."""
    options = {
        "eval_dataset": eval_tasks, "stage_rounds": [3], "load_best_model_at_end": True, "eval_strategy": "steps",
        "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
        "metric_for_best_model": "runtime", "greater_is_better": True, "callbacks": [FirstIsBest()],
    }  # fmt: skip
    make_trainer(max_steps=2, **options).train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    again = make_trainer(max_steps=6, **options)
    again.train(resume_from_checkpoint="last")
    assert [(record.round, record.stage) for record in again.ledger.rounds] == [(n, 1 + (n > 3)) for n in range(1, 7)]


def test_any_metric_of_several_sets_may_say_which_round_is_best(make_trainer):
    options = {"client_eval_size": 0.2, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        **options, save_strategy="steps", save_steps=1, metric_for_best_model="norm", greater_is_better=True,
        compute_metrics=lambda found: {"norm": float(np.abs(found.predictions).mean())},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric > 0
    assert trainer.stages[-1].metrics["eval_full_norm"] > 0


def test_prompts_of_rows_that_are_held_out_are_looked_for_at_once(make_trainer):
    texts = Dataset.from_dict({"text": ["a b c d"] * 40})
    with pytest.raises(ValueError, match="prompt"):
        make_trainer(train_dataset=texts, client_eval_size=0.2, predict_with_generate=True)


def test_training_anew_says_what_is_left_of_the_one_before(make_trainer, caplog):
    trainer = make_trainer()
    trainer.train()
    assert "of the training before" not in caplog.text
    trainer.train()
    assert "has stage-1, stage-2 of the training before" in caplog.text


def test_special_tokens_are_those_of_the_tokenizer_whatever_was_evaluated_before(make_trainer, eval_tasks, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), eval_dataset=eval_tasks, stage_rounds=[1])
    wanted = trainer.processing_class.eos_token_id
    trainer.evaluate()
    trainer.models.base.generation_config.eos_token_id = wanted + 1
    trainer.train()
    assert trainer.model.generation_config.eos_token_id in (wanted, [wanted, wanted + 1])
