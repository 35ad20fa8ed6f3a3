"""An end between two rounds."""

import re
import signal
import subprocess
import sys

import pytest
from transformers import TrainerCallback

from hf_devft.cli import running
from hf_devft.cli.errors import one_line_errors
from hf_devft.cli.running import stopping_between_rounds


class Signal(TrainerCallback):
    """Sends this process a signal within a round."""

    def __init__(self, number: int):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_ends_its_round_and_can_be_resumed(make_trainer, tmp_path, capsys, number):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    trainer = make_trainer(callbacks=[Signal(number)], disable_tqdm=False)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, one_line_errors(traceback=False), stopping_between_rounds(trainer):
        trainer.train()
    assert stopped.value.code == 130
    lines = re.split(r"[\r\n]", capsys.readouterr().err)  # as a log file has them, beside the bar's
    assert "stopping at the end of this round; once more to stop without its checkpoint" in lines
    assert "stopped after round 2: add `--resume_from_checkpoint last` to go on." in lines
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "stage-1").exists()
    again = make_trainer()
    again.train(resume_from_checkpoint="last")
    ends = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert ends[0] == ends[1]


def test_a_signal_while_processes_agree_is_not_lost(make_trainer, monkeypatch, tmp_path):
    """It comes after this round was found to go on: the next one is the last."""
    add_up, rounds = running.add_up, []

    def interrupted(asked):
        add_up(asked)
        rounds.append(len(rounds) + 1)
        if len(rounds) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(running, "add_up", interrupted)
    trainer = make_trainer(save_strategy="no")
    with pytest.raises(KeyboardInterrupt, match="stopped after round 2"), stopping_between_rounds(trainer):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-2").exists()


LONG = "--stage_layers 16 --stage_rounds 1 --eval_strategy no --eval_on_start no --save_strategy no".split()


def wait_until(run, said):
    so_far = ""
    while said not in so_far:
        letter = run.stderr.read(1)
        assert letter, f"the run has ended: {so_far}"
        so_far += letter


def test_the_second_time_it_ends_at_once(tmp_path):
    command = [sys.executable, "-m", "hf_devft", "train", "--config", "quickstart", *LONG, "--local_steps", "2000"]
    run = subprocess.Popen([*command, "--output_dir", tmp_path], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(run, "round 0")
        run.send_signal(signal.SIGINT)
        wait_until(run, "once more to stop without its checkpoint")
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=30) == -signal.SIGINT, "in a round of 4,000 steps"
    finally:
        run.kill()
        run.communicate()
