"""A run that pushes, and a process without our code that loads what it pushed, by the Hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import TOKEN, Fault, Repo, serve


RECIPE = Path(__file__).parents[2] / "recipes" / "devft.py"
SHORT = [
    "--stage_rounds", "1", "--local_steps", "1", "--task_rows", "100", "--task_eval_rows", "8",
    "--eval_strategy", "no", "--predict_with_generate", "false", "--push_to_hub", "--hub_model_id", "me/run",
    "--healing_steps", "1", "--distillation_steps", "1", "--calibration_samples", "4",
    "--generation_max_new_tokens", "2",
]  # fmt: skip


def run(home: Path, url: str, *command, token: str = TOKEN) -> subprocess.CompletedProcess:
    hub = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | hub
    )


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    with serve(folder / "hub") as hub:
        result = run(
            folder / "home", hub.url, RECIPE, *SHORT, "--output_dir", folder / "run", "--hub_private_repo", "true",
            "--hub_strategy", "checkpoint",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        yield hub, folder, result


def test_every_stage_is_a_commit_with_a_tag(pushed):
    hub, _, result = pushed
    repo = hub.repos["me/run"]
    assert repo.private
    messages = list(repo.messages.values())
    assert [message for message in messages if message.startswith("Stage")] == ["Stage 1", "Stage 2", "Stage 3"]
    assert set(repo.tags) == {"stage-1", "stage-2", "stage-3"}
    newest = repo.commits[repo.branches["main"]]
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "stage_config.json"}
    for stage in ("", "stage-1/", "stage-2/", "stage-3/"):
        assert {stage + name for name in expected} <= set(newest)
    assert "last-checkpoint/devft_state.json" in newest
    assert "Not on the Hub" not in result.stderr
    assert hub.cards
    assert 'from_pretrained("me/run", revision="stage-3")' in hub.cards[-1]


LOAD = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def weights(model):
    return sum(float(p.double().abs().sum()) for n, p in model.named_parameters() if "lora_" in n)

newest = AutoPeftModelForCausalLM.from_pretrained("me/run")
base = newest.peft_config["default"].base_model_name_or_path
found = {"newest": weights(newest)}
for stage in ("stage-1", "stage-2", "stage-3"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/run", subfolder=stage)
    found[stage] = weights(model)
    found[f"{stage}, by tag"] = weights(AutoPeftModelForCausalLM.from_pretrained("me/run", revision=stage))
AutoTokenizer.from_pretrained("me/run")
assert "hf_devft" not in sys.modules
print(json.dumps(found))
"""


def test_a_process_without_our_code_loads_every_stage_by_name(pushed):
    hub, folder, _ = pushed
    result = run(folder / "home", hub.url, "-c", LOAD)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for stage in ("stage-1", "stage-2", "stage-3"):
        assert found[stage] == found[f"{stage}, by tag"]
    assert found["newest"] == found["stage-3"] != found["stage-1"]


READ = """
import sys
import torch
from hf_devft import StageConfig, load_submodel
config = StageConfig.from_pretrained("me/run", subfolder="stage-2")
assert config.num_layers == 8 and StageConfig.from_pretrained("me/run", revision="stage-1").num_layers == 4
config.push_to_hub("me/record")
assert StageConfig.from_pretrained("me/record") == config
assert config.healing_steps == 1
here = load_submodel("embedded", sys.argv[1], stage=2).state_dict()
there = load_submodel("embedded", "me/run", stage=2).state_dict()
assert all(torch.equal(here[name], there[name]) for name in here)
"""


def test_a_stages_record_is_read_and_pushed_by_name(pushed):
    hub, folder, _ = pushed
    result = run(folder / "home", hub.url, "-c", READ, folder / "run")
    assert result.returncode == 0, result.stderr


def test_a_run_goes_on_from_the_hub_on_another_machine(pushed, tmp_path):
    hub, folder, _ = pushed
    repo = hub.repos["me/run"]
    repo.branches["halfway"] = repo.tags["stage-2"]
    local = [part for part in SHORT if part != "--push_to_hub"]
    result = run(
        tmp_path / "home", hub.url, RECIPE, *local, "--resume_from_hub", "me/run", "--hub_revision", "halfway",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run" / "stage-2").exists()
    # The third stage is taught by the second, whose layers were healed.
    for name in ("adapter_model.safetensors", "submodel/adapter_model.safetensors"):
        here, there = (path / "stage-3" / name for path in (tmp_path / "run", folder / "run"))
        assert here.read_bytes() == there.read_bytes()


READ_DATASETS = """
from hf_devft.tasks.data import load_datasets
train = load_datasets(["me/sums", "me/words"])
assert train.num_rows == 100 and set(train["source"]) == {"sums", "words"} and "completion" in train.column_names
assert load_datasets(["me/words"], split="test")["completion"][0].strip() == "Word 50."
load_datasets(["me/nothing"])
"""


def test_datasets_are_read_by_name(tmp_path):
    with serve(tmp_path / "hub") as hub:
        for name, line in {"sums": "What is {0} plus 1?,It is {0}.", "words": "Say word {0}.,Word {0}."}.items():
            rows = [line.format(number) for number in range(60)]
            splits = {"train": rows[:50], "test": rows[50:]}
            files = {f"{split}.csv": "\n".join(["question,answer", *part]) for split, part in splits.items()}
            repo = hub.repos[f"datasets:me/{name}"] = Repo(private=False)
            repo.commit("main", {path: hub.store(text.encode()) for path, text in files.items()}, "rows")
        result = run(tmp_path / "home", hub.url, "-c", READ_DATASETS)
    assert "ValueError: the dataset 'me/nothing' could not be read" in result.stderr.splitlines()[-1]


def test_a_run_survives_a_hub_that_is_down_and_is_pushed_by_the_command_it_names(tmp_path):
    with serve(tmp_path / "hub") as hub:
        hub.faults.append(Fault("/", 500))
        output = tmp_path / "run"
        result = run(tmp_path / "home", hub.url, RECIPE, *SHORT, "--output_dir", output)
        assert result.returncode == 0, result.stderr
        assert (output / "stage-3" / "adapter_model.safetensors").exists()
        assert "Not on the Hub: Stage 1, Stage 2, Stage 3" in result.stderr
        command = result.stderr.partition("Push it with: devft ")[2].split()[:3]
        assert command == ["push", str(output), "me/run"]
        hub.faults.clear()
        result = run(tmp_path / "home", hub.url, "-m", "hf_devft", *command)
        assert result.returncode == 0, result.stderr
        assert set(hub.repos["me/run"].tags) == {"stage-1", "stage-2", "stage-3"}
