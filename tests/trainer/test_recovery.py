"""`kill -9` at random moments: the run that is gone on with ends as the one that was left alone, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FirstIsBest
from launching import environment
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_devft import DevFTTrainer
from hf_devft.embedded import task_dataset
from hf_devft.tasks.data import IGNORED, tokenize
from hf_devft.trainer.stage_runner import StageRunner


def contents(output: Path) -> dict:
    """Whatever of a finished run does not depend on the time it took."""
    adapters = {
        str(path.relative_to(output)): {name: tensor.tolist() for name, tensor in load_file(path).items()}
        for path in output.rglob("*.safetensors")
        if not path.relative_to(output).parts[0].startswith("checkpoint")
    }
    timed = ("seconds", "peak_memory")
    ledger = [
        {key: value for key, value in record.items() if key not in timed}
        for record in json.loads((output / "ledger.json").read_text())
    ]
    return {"adapters": adapters, "ledger": ledger, "files": sorted(path.name for path in output.iterdir())}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_ten_kills_leave_no_trace(tmp_path):
    """`tests/kills.py` has more, also on several processes and over a network."""
    script = Path(__file__).with_name("killed.py")
    result = subprocess.run(
        [sys.executable, script, tmp_path, "10", "0"],
        capture_output=True, text=True, timeout=600,
        env=environment(script.parents[1]),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["kills"] == 10
    whole = contents(tmp_path / "whole")
    assert len(whole["adapters"]) == 1 + 3 * 2
    for number in range(seen["runs"]):
        assert contents(tmp_path / f"run-{number}") == whole


def test_a_checkpoint_that_a_kill_left_over_goes(make_trainer):
    """Where the kill came between the last save and the rotation."""
    options = {"save_strategy": "steps", "save_steps": 1}
    output = Path(make_trainer(**options).args.output_dir)
    make_trainer(**options).train()
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert len(kept) > 1
    make_trainer(**options, save_total_limit=1).train(resume_from_checkpoint="last")
    assert [path.name for path in output.glob("checkpoint-*")] == kept[-1:]


def test_a_deletion_that_a_kill_cut_short_deletes_nothing_else(make_trainer, monkeypatch):
    """What is left of the folder must not be taken for the newest checkpoint, which is kept."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(**options)
    output = Path(trainer.args.output_dir)
    rmtree = shutil.rmtree

    def killed(path, *args, **kwargs):
        if Path(path).name in ("checkpoint-1", ".checkpoint-1.old") and Path(path).exists():
            next(Path(path).glob("*.json")).unlink()
            os.utime(path, (time.time() + 100, time.time() + 100))  # a slow disk
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    make_trainer(**options).train(resume_from_checkpoint="last")
    last = trainer.run.num_rounds
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == [f"checkpoint-{last}"]


def test_a_client_without_labels_is_left_out_of_the_loss_and_learns_nothing(make_trainer, tokenizer, monkeypatch):
    def rows(seed: int, silent: bool):
        encoded = tokenize(task_dataset(8, seed=seed), tokenizer, 64).select_columns(["input_ids", "labels"])
        return encoded.map(lambda row: {"labels": [IGNORED] * len(row["labels"])}) if silent else encoded

    def train(silent: bool, **options):
        clients = {"a": rows(3, silent), "b": rows(4, silent=False)}
        one_round = {"stage_layers": [4], "stage_rounds": [1], "clients_per_round": 2, "overwrite_output_dir": True}
        trainer = make_trainer(train_dataset=clients, num_clients=None, **one_round, **options)
        trainer.train()
        return trainer

    changes, train_client = {}, StageRunner.train_client

    def watched(self, learning_rate, turn):
        result, adapter = train_client(self, learning_rate, turn)
        changes[turn.client] = (adapter - turn.start).abs().max().item()
        return result, adapter

    monkeypatch.setattr(StageRunner, "train_client", watched)
    for options in ({}, {"clients_per_batch": 2}):
        both, trainer = train(silent=False, **options), train(silent=True, **options)
        (record,) = trainer.ledger.rounds
        assert not record.dropped
        assert record.loss == pytest.approx(both.run.client_losses["b"], rel=1e-5), "that of the other alone"
        assert changes[0] == 0
        assert changes[1] > 0


class ClockAhead(TrainerCallback):
    """The clock is ahead while a checkpoint is written, and right again before the next."""

    def on_save(self, args, state, control, **kwargs):
        os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (4e9 - state.global_step,) * 2)


def test_checkpoints_are_rotated_by_round_whatever_the_clock_says(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "callbacks": [ClockAhead()]}
    make_trainer(**options).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_disk_that_is_full_is_named_and_leaves_nothing_half_written(make_trainer, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = make_trainer(save_strategy="steps", save_steps=2)
    monkeypatch.setattr("hf_devft.files.writing.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*adapter_model\.safetensors'"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".run.lock"]
    trainer = make_trainer(overwrite_output_dir=False)
    trainer.train(resume_from_checkpoint="last")


class StopsAfter(TrainerCallback):
    """Tells the run to stop after its second round."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 2


def test_a_run_that_a_callback_stops_within_a_stage_goes_on_there(make_trainer):
    """Though no checkpoint of that round was asked for."""
    whole = make_trainer(stage_rounds=[4])
    whole.train()
    options = {"stage_rounds": [4], "save_strategy": "steps", "save_steps": 10, "overwrite_output_dir": True}
    make_trainer(**options, callbacks=[StopsAfter()]).train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint="last")
    assert [stage.rounds_done for stage in again.stages] == [4, 4]
    for key, tensor in whole.run.adapter.state.items():
        assert torch.equal(tensor, again.run.adapter.state[key]), key


@pytest.mark.parametrize("change", ["order", "rows"])
def test_clients_that_are_others_by_their_number_are_refused(make_trainer, tasks, change):
    """What one keeps would become another's."""
    clients = {name: tasks.select(range(10 * k, 10 * k + 10)) for k, name in enumerate("abc")}
    options = {"federated_method": "fedsa_lora", "num_clients": None, "save_strategy": "steps", "save_steps": 1}
    make_trainer(train_dataset=clients, max_steps=2, **options).train()
    others = dict(reversed(clients.items()))
    if change == "rows":
        others = {
            name: tasks.select(range(*span)) for name, span in zip("abc", ((0, 15), (15, 20), (20, 30)), strict=True)
        }
    with pytest.raises(ValueError, match=r"is of a run with clients and their rows \(checksum\)"):
        make_trainer(train_dataset=others, **options).train(resume_from_checkpoint="last")
    again = make_trainer(train_dataset=clients, **options)
    again.train(resume_from_checkpoint="last")
    assert len(again.ledger.rounds) == 4


def test_what_was_saved_as_models_only_is_nothing_to_go_on_from(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "overwrite_output_dir": False}
    make_trainer(**options, max_steps=1).train(resume_from_checkpoint="last")
    shutil.rmtree(Path(make_trainer(**options).args.output_dir) / "stage-1")  # as if killed within the stage
    with pytest.raises(ValueError, match="checkpoint-1, but nothing that a run can go on from, as with `save_only_mo"):
        make_trainer(**options).train(resume_from_checkpoint="last")


def test_the_best_round_is_found_again_however_often_a_run_goes_on_elsewhere(make_trainer, eval_tasks, tmp_path):
    options = {
        "eval_dataset": eval_tasks, "stage_layers": [4], "stage_rounds": [5], "load_best_model_at_end": True,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "metric_for_best_model": "runtime", "greater_is_better": True,
    }  # fmt: skip

    def stopped_after(rounds: int, folder: str, checkpoint: str) -> DevFTTrainer:
        trainer = make_trainer(output_dir=tmp_path / folder, callbacks=[FirstIsBest()], max_steps=rounds, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    stopped_after(2, "old", "last")
    stopped_after(3, "new", str(tmp_path / "old" / "checkpoint-2"))
    ended = stopped_after(5, "new", "last")
    assert ended.state.best_model_checkpoint == str(tmp_path / "old" / "checkpoint-1")
