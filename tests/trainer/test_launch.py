"""The same run on one process and on several, each as `accelerate launch` starts it.

What `client_parallel` computes is bit for bit what one process computes: each client is trained on one process, and
their sum is rounded once. `data_parallel` adds the gradients of a batch's parts in another order, so that adapters
agree to the rounding of single precision, which Adam's division makes larger where gradients are nearly 0.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import environment
from safetensors.torch import load_file

from hf_devft import StageConfig


SCRIPT = Path(__file__).with_name("launched.py")
SEVERAL = Path(__file__).with_name("launched_methods.py")  # runs, one after the other
LAUNCH_CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
OPTIONS = {
    "clients_per_round": 3,
    "eval_strategy": "steps",
    "eval_on_start": True,  # by DeepSpeed, too, before there is a stage
    "eval_steps": 1,
    "predict_with_generate": True,
    "generation_max_new_tokens": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}
ROUNDING = 1e-3  # of an adapter's norm; observed: up to 3e-5


def run(command: list, options: dict, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command), script, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(SCRIPT.parent, SCRIPT.parents[1]),
    )


def launch(
    folder: Path, name: str, processes: int, options: dict, script: Path = SCRIPT
) -> subprocess.CompletedProcess:
    """By the project's launch config `name`, on the CPU."""
    content = yaml.safe_load((LAUNCH_CONFIGS / f"{name}.yaml").read_text())
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(content | {"use_cpu": True, "num_processes": processes}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", 0]
    return run(launcher, options, script)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run on one process."""
    output = tmp_path_factory.mktemp("alone")
    result = run([sys.executable], OPTIONS | {"output_dir": str(output)})
    assert result.returncode == 0, result.stderr
    return output


def difference(folder: Path, other: Path) -> float:
    """Largest distance of two adapters' tensors, relative to their norms."""
    a, b = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).norm() / a[key].norm().clamp_min(1e-12)) for key in a)


@pytest.mark.parametrize(("name", "processes", "options", "resumed", "tolerance"), [
    ("cpu-2", 2, {}, False, 0),
    ("cpu-2", 4, {}, True, 0),  # more processes than clients
    ("cpu-2", 2, {"client_placement": "data_parallel"}, True, ROUNDING),
    ("zero1", 2, {}, True, ROUNDING),
    ("zero2", 2, {}, False, ROUNDING),
    ("zero3", 2, {}, True, ROUNDING),
], ids=["client_parallel", "more-processes-than-clients", "ddp", "zero1", "zero2", "zero3"])  # fmt: skip
def test_the_run_is_the_same_on_several_processes(alone, tmp_path, name, processes, options, resumed, tolerance):
    output = tmp_path / "output"
    if resumed:  # in the middle of a stage, from what one process has written
        shutil.copytree(alone / "checkpoint-1", output / "checkpoint-1")
        options = options | {"resume_from_checkpoint": "last"}
    result = launch(tmp_path, name, processes, OPTIONS | options | {"output_dir": str(output)})
    assert result.returncode == 0, result.stderr
    for folder in ("stage-1", "stage-2", "stage-2/submodel", "checkpoint-3", "."):
        assert difference(alone / folder, output / folder) <= tolerance
    assert difference(alone, Path(f"{output}-saved")) <= tolerance
    ledgers = [json.loads((path / "ledger.json").read_text()) for path in (alone, output)]
    for here, there in zip(*ledgers, strict=True):
        assert [here[key] for key in ("clients", "bytes_up")] == [there[key] for key in ("clients", "bytes_up")]
        assert 0.7 * here["tokens"] < there["tokens"] <= here["tokens"]  # a share is padded to its own longest row
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
    for stage in ("stage-1", "stage-2"):
        metrics = [StageConfig.from_pretrained(path, subfolder=stage).metrics for path in (alone, output)]
        assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-4)
        assert metrics[1]["eval_full_loss"] == pytest.approx(metrics[0]["eval_full_loss"], rel=1e-4)
        assert metrics[1]["eval_full_exact_match"] == metrics[0]["eval_full_exact_match"]


HALF = {
    "evaluated": {"eval_strategy": "epoch", "predict_with_generate": True},
    "distilled": {"distillation_steps": 2},  # of layers that no engine has seen yet
    "healed": {"healing_steps": 2, "distillation_steps": 2},
}


def test_half_precision_under_zero2(tmp_path):
    options = {
        "bf16": True, "gradient_accumulation_steps": 2, "activation_checkpointing": True, "optim": "adamw_torch",
        "generation_max_new_tokens": 2, "learning_rate": 1e-2, "clients_per_round": 2, "runs": HALF,
    }  # fmt: skip
    for result in (
        run([sys.executable], options | {"output_dir": str(tmp_path / "one")}, SEVERAL),
        launch(tmp_path, "zero2", 2, options | {"output_dir": str(tmp_path / "zero2")}, SEVERAL),
    ):
        assert result.returncode == 0, result.stderr
    for name in HALF:
        ledgers = [json.loads((tmp_path / how / name / "ledger.json").read_text()) for how in ("one", "zero2")]
        losses = [[record["loss"] for record in ledger] for ledger in ledgers]
        assert losses[1] == pytest.approx(losses[0], rel=2e-3), name


def test_processes_start_from_one_adapter_whatever_each_has_made(tmp_path):
    options = {"clients_per_round": 4, "stage_rounds": [1], "makes_adapter": True}
    one, two = tmp_path / "one", tmp_path / "two"
    for result in (
        run([sys.executable], options | {"output_dir": str(one)}),
        launch(tmp_path, "cpu-2", 2, options | {"output_dir": str(two)}),
    ):
        assert result.returncode == 0, result.stderr
    assert difference(one, two) == 0


@pytest.mark.parametrize("placement", ["client_parallel", "data_parallel"])
def test_a_process_that_fails_ends_the_launch_with_its_error(tmp_path, placement):
    options = {"output_dir": str(tmp_path / "output"), "client_placement": placement, "fail": [1, 2]}
    started = time.monotonic()
    result = launch(tmp_path, "cpu-2", 2, options)
    assert result.returncode != 0
    assert time.monotonic() - started < 120, "the other process would wait for half an hour"
    assert "OSError: the disk of process 1 is full" in result.stderr


def test_no_engine_outlives_its_stage(tmp_path):
    """DeepSpeed is known to keep ZeRO-3 engines: see `engines.py`."""
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    options = {"output_dir": str(tmp_path / "output"), "stage_layers": [1, 2, 3, 4], "stage_rounds": [1]}
    options |= {"eval_on_start": True, "eval_strategy": "epoch"}
    result = launch(tmp_path, "zero3", 2, options | {"fail": [0, 0]}, script)
    assert result.returncode == 0, result.stderr
    assert "engines alive: [1, 1, 1, 1]" in result.stdout


COUNT = """
import gc, json, sys
import launched
from deepspeed.runtime.engine import DeepSpeedEngine
from transformers import TrainerCallback

alive = []

class Count(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        gc.collect()
        alive.append(sum(type(thing) is DeepSpeedEngine for thing in gc.get_objects()))

launched.Fail = lambda *args: Count()
trainer = launched.main(json.loads(sys.argv[1]))
if trainer.is_world_process_zero():
    print("engines alive:", alive)
"""
