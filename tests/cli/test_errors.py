"""Errors of one line."""

import pytest

from hf_devft.cli.errors import one_line_errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lora_r=0:\n  give 1 or more."), "error: lora_r=0: give 1 or more."),
        (OSError(28, "No space left on device", "a/b"), "error: [Errno 28] No space left on device: 'a/b' (`--trace"),
        (RuntimeError("wandb is not installed"), "error: wandb is not installed (`--traceback` shows where)"),
        (FileNotFoundError("a.jsonl is not a file"), "error: a.jsonl is not a file"),
        (MemoryError(), "error: MemoryError (`--traceback` shows where)"),
    ],
)
def test_an_error_is_one_line(error, line):
    with pytest.raises(SystemExit) as stopped, one_line_errors(traceback=False):
        raise error
    assert stopped.value.code.startswith(line)
    assert ("--trace" in stopped.value.code) == ("--trace" in line)
    assert "\n" not in stopped.value.code
    with pytest.raises(type(error)), one_line_errors(traceback=True):
        raise error


def test_a_command_without_traces_does_not_name_them(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise OSError("no network")
    assert stopped.value.code == "error: no network"
    with pytest.raises(SystemExit), one_line_errors():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "stopped.\n"
