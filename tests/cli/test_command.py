"""The command `devft`, in this process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_devft
from hf_devft.__main__ import app
from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.configs import find_config, packaged_configs


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
ROWS = "question,answer\n" + "".join(f"{n}+1?,{n + 1}\n" for n in range(20))
SHORT = "--stage_layers 4 16 --stage_rounds 1 --local_steps 1 --per_device_train_batch_size 4".split()


def run(*command, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, command)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_help_is_one_screen_and_does_not_wait_for_torch():
    code = (
        "import sys; from hf_devft.__main__ import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for command in (["--help"], ["train", "--help"], ["plan", "--help"]):
        subprocess.run([sys.executable, "-c", code, *command], check=True)
    for command in ([], ["train"], ["plan"], ["federation"]):
        lines = run(*command, "--help").splitlines()
        assert len(lines) < 50
        assert all(len(line) <= 80 for line in lines), [line for line in lines if len(line) > 80]
    assert run("plan", "--help").startswith("usage: devft plan ")
    assert run("--version") == f"hf-devft {hf_devft.__version__}\n"
    assert run("train") == run("train", "--help")  # trains nothing that was not asked for
    assert "--warmup_steps" in run("train", "--help-all")


def test_a_folder_does_not_hide_the_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fedit").mkdir()
    assert find_config("fedit").is_file()


def test_every_recipe_is_a_packaged_config():
    assert packaged_configs() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert find_config("fedit").read_text() == (CONFIGS / "fedit.yaml").read_text()
    with pytest.raises(ValueError, match=r"there is no config nothing: give the path .*quickstart"):
        parse_arguments(["--config", "nothing"])


def test_a_config_that_is_not_there_does_not_wait_for_torch():
    code = (
        "import sys; from hf_devft.__main__ import main; sys.argv[1:] = ['train', '--config', 'nothing']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("error: there is no config nothing: give"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "said"), [
    (["train", "--learning_rate", "abc"], "argument --learning_rate/--learning-rate: invalid float value: 'abc'"),
    (["train", "--stage_layers", "4,16"], "invalid int value: '4,16'. Separate values by spaces."),
    (["evaluate", "outputs/quickstart"], "the following arguments are required: --run, --stage"),
])  # fmt: skip
def test_a_value_that_is_none_is_one_line(command, said):
    output = run(*command, code=1)
    assert output.count("\n") <= 1
    assert output.startswith("error: ")
    assert said in output


def test_files_of_ones_own_are_clients_and_are_compared(tmp_path, monkeypatch):
    """JSONL beside CSV, a tenth held out; then another run of the same, and both side by side."""
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(ROWS)
    Path("b.jsonl").write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(20)))
    _, args = parse_arguments(["--train_file", "a.csv", "b.jsonl"])
    assert (args.partition, args.partition_column) == ("natural", "source")
    for name, more in (("one", []), ("two", ["--wire_dtype", "int4"])):
        run("train", "--train_file", "a.csv", "b.jsonl", "--output_dir", name, *SHORT, *more)
    again = run("train", "--train_file", "a.csv", "b.jsonl", "--output_dir", "one", *SHORT, code=1)
    assert again.startswith("error: one holds a run already (checkpoint-2, stage-1, stage-2): go on"), (
        "nothing before it"
    )
    ledger = json.loads(Path("one/ledger.json").read_text())
    assert {client for record in ledger for client in record["clients"]} == {"a", "b"}
    card = Path("one/README.md").read_text()
    assert "4 held-out rows" in card
    said = run("compare", "one", "two", "--plot", "curves.png")
    assert "one" in said
    assert Path("curves.png").stat().st_size > 10_000
    assert "error: compare needs two runs or more" in run("compare", "one", code=1)
