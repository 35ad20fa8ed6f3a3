"""Errors of one line, and an end between two rounds."""

import signal

import pytest
from transformers import TrainerCallback

from hf_devft.cli.running import one_line_errors, stopping_between_rounds


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lora_r=0:\n  give 1 or more."), "error: lora_r=0: give 1 or more."),
        (OSError(28, "No space left on device", "a/b"), "error: [Errno 28] No space left on device: 'a/b' (`--trace"),
        (RuntimeError("wandb is not installed"), "error: wandb is not installed (`--traceback` shows where)"),
        (MemoryError(), "error: MemoryError (`--traceback` shows where)"),
    ],
)
def test_an_error_is_one_line(error, line):
    with pytest.raises(SystemExit) as stopped, one_line_errors(traceback=False):
        raise error
    assert stopped.value.code.startswith(line)
    assert "\n" not in stopped.value.code
    with pytest.raises(type(error)), one_line_errors(traceback=True):
        raise error


class Signal(TrainerCallback):
    """Sends this process a signal within a round."""

    def __init__(self, number: int, times: int = 1):
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_ends_its_round_and_can_be_resumed(make_trainer, tmp_path, capsys, number):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    trainer = make_trainer(callbacks=[Signal(number)])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, one_line_errors(traceback=False), stopping_between_rounds(trainer):
        trainer.train()
    assert stopped.value.code == 130
    lines = capsys.readouterr().err
    assert "stopping at the end of this round; once more to stop at once" in lines
    assert "stopped after round 2: go on with `--resume_from_checkpoint last`." in lines
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "stage-1").exists()
    again = make_trainer()
    again.train(resume_from_checkpoint="last")
    ends = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert ends[0] == ends[1]


@pytest.fixture
def interruptible():
    """SIGINT raises, as in a process of one's own: some that run tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_time_it_ends_at_once(interruptible, make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Signal(signal.SIGINT, times=2)])
    with pytest.raises(KeyboardInterrupt), stopping_between_rounds(trainer):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
