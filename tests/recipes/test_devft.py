"""The recipe as a user calls it: in processes of its own."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer


RECIPE = Path(__file__).parents[2] / "recipes" / "devft.py"
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPE),
]  # fmt: skip
SHORT = [
    "--stage_rounds", "1", "--local_steps", "2", "--task_rows", "100", "--task_eval_rows", "8", "--eval_steps", "1",
    "--calibration_samples", "4",
]  # fmt: skip


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart")
    result = run(*LAUNCH, *SHORT, "--output_dir", output)
    assert result.returncode == 0, result.stderr
    return output, result


def test_the_quickstart_needs_no_argument_but_where_to_write(launched):
    output, result = launched
    assert "4 → 8 → 16 layers" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if "/3" in line] == ["1/3", "2/3", "3/3"]
    assert "Warning" not in result.stderr, result.stderr
    for folder in (output, output / "stage-1", output / "stage-2", output / "stage-3"):
        assert (folder / "adapter_model.safetensors").exists()


LOAD = """
import sys
assert "hf_devft" not in sys.modules
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, stage = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{stage}")
base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
PeftModel.from_pretrained(base, folder, subfolder=stage)
generate = pipeline("text-generation", model=f"{folder}/{stage}")
text = generate("Write every word twice: red cat\\nAnswer:", max_new_tokens=5, return_full_text=False)
assert isinstance(text[0]["generated_text"], str)
assert "hf_devft" not in sys.modules
"""


@pytest.mark.parametrize("stage", ["stage-1", "stage-3"])
def test_a_process_without_our_code_loads_a_stage(launched, stage):
    result = run(sys.executable, "-c", LOAD, launched[0], stage)
    assert result.returncode == 0, result.stderr


def test_an_experiment_is_its_config(tmp_path):
    rows = '{"question": "What is 1 + 1?", "answer": "2"}\n' * 12
    for name in ("maths", "more", "test"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    result = run(
        sys.executable, RECIPE, "--config", RECIPE.parent / "configs" / "fedit.yaml", *SHORT,
        "--train_file", tmp_path / "maths.jsonl", tmp_path / "more.jsonl", "--eval_file", tmp_path / "test.jsonl",
        "--num_clients", "2", "--partition", "natural", "--partition_column", "source",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "  1/1 " in result.stdout


@pytest.mark.parametrize(("argv", "message"), [
    (["--learning_rat", "1"], "Did you mean 'learning_rate'?"),
    (["--stage_layers", "4", "64"], "end at the model's 16 layers"),
    (["--train_file", "nowhere.json"], "nowhere.json is not a file"),
    (["--plan", "true", "--federated_method", "flora", "--transfer", "anchor"], "cannot go with transfer='anchor'"),
    (["--config", "broken.yaml"], "the config broken.yaml cannot be read: "),
    (["--config", "."], "there is no config .: give the path of a YAML file"),
    (["--train_file", "broken.jsonl"], "broken.jsonl"),
    (["--resume_from_checkpoint", "nonsense"], "nonsense"),
    (["--report_to", "wandb"], "requires wandb to be installed. Run `pip install wandb`"),
    (["--model_name_or_path", "nobody/nothing"], "the model nobody/nothing cannot be loaded: "),
    (["--model_name_or_path", "./nowhere"], "./nowhere cannot be loaded: there is no such folder, and no such name"),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("broken.yaml", "broken.jsonl"):
        Path(name).write_text('{"prompt": "a", "completion": "b"}\n{"prompt": [')
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv, "--output_dir", "out"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert str(end.value.code).startswith("error: ")
    assert message in end.value.code
    assert "\n" not in end.value.code


def test_two_processes_that_are_told_to_stop_end_the_same_round(tmp_path):
    two = ["--config_file", RECIPE.parent / "accelerate" / "cpu-2.yaml", "--main_process_port", "0", RECIPE]
    flags = [
        *SHORT,
        "--stage_layers",
        "4",
        "16",
        "--stage_rounds",
        "200",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    launched = subprocess.Popen(
        [*LAUNCH[:3], *two, *flags, "--eval_strategy", "no", "--eval_on_start", "no", "--output_dir", tmp_path],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not (tmp_path / "checkpoint-1").exists():
        assert launched.poll() is None
        time.sleep(0.1)
    launched.send_signal(signal.SIGTERM)
    said = launched.communicate(timeout=100)[1]
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert last < 200
    assert said.count("stopped after round") == 1
    assert f"stopped after round {last}: add `--resume_from_checkpoint last` to go on." in said


def in_process(folder, *flags):
    """The trainer that the recipe makes."""
    quickstart = RECIPE.parent / "configs" / "quickstart.yaml"
    return make_trainer(*parse_arguments([*SHORT, *flags, "--output_dir", str(folder)], quickstart))


def test_stages_that_end_themselves(tmp_path):
    flags = "--early_stopping_patience 1 --stage_rounds 4 --learning_rate 1e-12 --eval_on_start no".split()
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        in_process(tmp_path, *flags)
    best = ["--load_best_model_at_end", "true", "--save_strategy", "steps", "--save_steps", "1"]
    trainer = in_process(tmp_path, *flags, *best, "--stage_layers", "2", "16", "--predict_with_generate", "false")
    trainer.train()
    assert [stage.rounds_done < 4 for stage in trainer.stages] == [True, True]


def test_patience_is_not_forgotten_where_a_run_goes_on(tmp_path):
    flags = "--early_stopping_patience 2 --stage_rounds 5 --learning_rate 1e-12 --eval_on_start no".split()
    flags += "--load_best_model_at_end true --save_strategy steps --save_steps 1 --predict_with_generate no".split()
    flags += ["--stage_layers", "16"]
    flags += ["--save_total_limit", "9"]
    in_process(tmp_path, *flags, "--max_steps", "2").train()
    again = in_process(tmp_path, *flags)
    again.train("last")
    assert again.stages[0].rounds_done == 3, "the best, and two more"
    more = in_process(tmp_path, *flags, "--early_stopping_patience", "3")
    more.train(str(tmp_path / "checkpoint-2"))
    assert more.stages[0].rounds_done == 4, "by the patience that it is given"


def test_what_the_server_asks_is_held_out_of_training(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": f" {n}"}) + "\n" for n in range(40)))
    trainer = in_process(
        tmp_path, "--train_file", str(rows), "--distillation_steps", "2", "--partition", "iid", "--num_clients", "2",
        "--eval_strategy", "no", "--eval_on_start", "false", "--predict_with_generate", "false",
    )  # fmt: skip
    asked, trained = trainer.calibration_dataset["input_ids"][:], trainer.train_dataset["input_ids"][:]
    assert (len(asked), len(trained)) == (4, 36)
    assert not {*map(tuple, asked)} & {*map(tuple, trained)}


def test_the_server_has_texts_of_its_own(tmp_path, tokenizer):
    """Prompts need no answer; nothing is held out of training for them."""
    rows, own = tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": f" {n}"}) + "\n" for n in range(40)))
    own.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(9)))
    flags = "--healing_steps 2 --partition iid --num_clients 2 --eval_strategy no --eval_on_start false".split()
    flags += ["--predict_with_generate", "false", "--calibration_file", str(own), "--calibration_samples", "6"]
    trainer = in_process(tmp_path, "--train_file", str(rows), *flags)
    assert len(trainer.train_dataset) == 40
    asked = tokenizer.batch_decode(trainer.calibration_dataset["input_ids"][:], skip_special_tokens=True)
    assert asked == [f"What is {n}?" for n in range(6)]
    assert len(in_process(tmp_path, *flags).calibration_dataset) == 6, "with made-up tasks, too"
    for unread in (["--trainer", "sft"], ["--healing_steps", "0"]):
        with pytest.raises(ValueError, match="calibration_file is read for"):
            in_process(tmp_path, *flags, *unread)
