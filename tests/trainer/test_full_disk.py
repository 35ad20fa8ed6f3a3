"""A disk that is full at any write, or becomes read-only: an error that names a file, and nothing is lost."""

import shutil
import subprocess

import pytest
from test_recovery import contents
from transformers import TrainerCallback


OPTIONS = {"save_strategy": "steps", "save_steps": 1, "stage_layers": [2, 3, 4], "resume_from_checkpoint": "last"}


def mount(*command) -> bool:
    return subprocess.run(["mount", *map(str, command)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, as large as is asked for."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", place):
        pytest.skip("this user may mount nothing")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def train(make_trainer, folder):
    trainer = make_trainer(output_dir=folder, overwrite_output_dir=False, **OPTIONS)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)


@pytest.fixture
def whole(make_trainer, tmp_path):
    train(make_trainer, tmp_path / "whole")
    return tmp_path / "whole"


def test_a_disk_that_is_full_at_any_write_loses_nothing(make_trainer, disk, whole):
    needed = sum(path.stat().st_blocks for path in whole.rglob("*")) // 2  # in KiB
    errors = []
    for part in range(7):
        assert mount("-o", f"remount,size={max(4, needed * part // 6)}k", disk)
        try:
            train(make_trainer, disk / "run")
        except OSError as error:
            errors.append(str(error))
        assert not list(disk.rglob("*.tmp")), "nothing half-written"
    assert len(errors) > 3
    assert all(str(disk) in error and "No space left" in error for error in errors)
    assert mount("-o", "remount,size=64m", disk)
    train(make_trainer, disk / "run")
    assert contents(disk / "run") == contents(whole)


class ReadOnlyAt(TrainerCallback):
    def __init__(self, step, place):
        self.step, self.place = step, place

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            # Mounted over itself, as what is written to (the lock) can become read-only in no other way.
            assert mount("--bind", self.place, self.place)
            assert mount("-o", "remount,bind,ro", self.place)


def test_a_folder_that_becomes_read_only_loses_nothing(make_trainer, disk, whole):
    for step in (1, 3, 6):  # within and at the end of stages
        trainer = make_trainer(
            output_dir=disk / "run", overwrite_output_dir=False, callbacks=[ReadOnlyAt(step, disk)], **OPTIONS
        )
        with pytest.raises(OSError, match=f"Read-only file system.*{disk}|{disk}.*Read-only file system"):
            trainer.train(resume_from_checkpoint="last")
        subprocess.run(["umount", disk], check=True)
    train(make_trainer, disk / "run")
    assert contents(disk / "run") == contents(whole)
