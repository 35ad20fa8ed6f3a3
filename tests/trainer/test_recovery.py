"""`kill -9` at random moments: the run that is gone on with ends as the one that was left alone, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file


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
def test_twenty_kills_leave_no_trace(tmp_path):
    script = Path(__file__).with_name("killed.py")
    result = subprocess.run(
        [sys.executable, script, tmp_path, "20", "0"],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["kills"] == 20
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
