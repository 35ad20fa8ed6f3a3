"""Public benchmarks of a stage by the recipe, on a local task."""

import json

import pytest
from huggingface_hub import ModelCard
from test_benchmarks import local_tasks, run  # noqa: F401 (fixtures)

from hf_devft.cli.evaluate import EvaluationArguments
from hf_devft.cli.evaluate import evaluate as measure


def evaluate(**options) -> None:
    measure(EvaluationArguments(**options))


def test_scores_and_answers_of_a_stage(run, local_tasks, tmp_path, capsys):  # noqa: F811
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["1 + 1?"]}))
    common = {"run": str(run), "tasks": ["local_choice"], "include_path": local_tasks}
    evaluate(stage=2, questions=str(questions), max_new_tokens=4, **common)
    evaluate(stage=1, submodel=True, **common)
    printed = capsys.readouterr().out
    assert "local_choice" in printed
    assert (run / "model_answer" / "run-stage-2.jsonl").exists()
    for folder, of in (
        ("", "stage 2, full depth"),
        ("stage-2", "stage 2, full depth"),
        ("stage-1", "stage 1, submodel"),
    ):
        results = ModelCard.load(run / folder / "README.md").data.eval_results
        assert [each.dataset_config for each in results if each.dataset_type == "local_choice"] == [of]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "nothing to do"),
        ({"tasks": ["local_choice"], "push_to_hub": True}, "push_to_hub needs a repository"),
        ({"tasks": ["local_choice"], "stage": 7}, "stage-7"),
        ({"questions": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, options, why):
    with pytest.raises((ValueError, OSError), match=why):
        evaluate(**{"run": str(tmp_path), "stage": 1} | options)
