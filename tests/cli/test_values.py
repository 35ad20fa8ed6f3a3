"""Values of a YAML file against the options' types."""

import re
from typing import Any

import pytest

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.values import check_value


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        (2.5, int, "a whole number"),
        (10.0, int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (None, int, "a whole number"),
        ([1e-3], float, "a number"),
        ("maybe", bool, "true or false"),
        (3, str, "text"),
        ([1, "x"], list[int] | None, "a list of whole numbers or nothing"),
        (3, dict | str | None, "a mapping or text or nothing"),
    ],
)
def test_what_is_allowed_is_said(value, hint, allowed):
    with pytest.raises(ValueError, match=re.escape(f"option={value!r} in run.yaml: give {allowed}.")):
        check_value("option", value, hint, "run.yaml")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (2, int),
        (2, float),
        ("1e-3", float),
        ("5", int),
        (True, bool),
        (None, str | None),
        ([1, 2], list[int]),
        (object(), Any),
    ],
)
def test_what_fits_is_taken(value, hint):
    check_value("option", value, hint, "run.yaml")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("task_rows:", "task_rows=None in .*: give a whole number"),
        ("lora_r: [8]", r"lora_r=\[8\] in .*: give a whole number"),
        ("num_clients: 2.5", "num_clients=2.5 in .*: give a whole number or nothing"),
        ("learning_rate: [1e-3]", "learning_rate=.* in .*: give a number"),
        ("1: 3", "unknown key '1'"),
        ("on: 3", "unknown key 'True'"),
        ("stage-rounds: 3", "unknown key 'stage-rounds' in .* Did you mean 'stage_rounds'"),
        ("--seed: 7", "unknown key '--seed' in .* Did you mean 'seed'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_one_line(tmp_path, line, says):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\n{line}\n")
    with pytest.raises(ValueError, match=says) as error:
        parse_arguments([], path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["'dtype'", "{dtype: float32}", "[1]"])
def test_a_mapping_on_the_command_line_is_json(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\n")
    with pytest.raises(ValueError, match=r"^model_init_kwargs=.* is no mapping: write it as JSON"):
        parse_arguments(["--model_init_kwargs", value], path)
