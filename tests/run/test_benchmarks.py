import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_devft import load_submodel
from hf_devft.run.benchmarks import (
    Score,
    add_to_card,
    answer_questions,
    load_stage,
    read_questions,
    run_tasks,
    write_answers,
)


INPUT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def run(make_trainer, eval_tasks, tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    rules = {"grouping": "bridged", "fusion": "bridge", "transfer": "anchor"}
    trainer = make_trainer(model=str(tmp_path / "base"), eval_dataset=eval_tasks, stage_rounds=[1], **rules)
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.fixture
def local_tasks(tmp_path) -> str:
    """A folder with one task of multiple choice and one of generation, on local rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{a} plus {b}?", "target": str(a + b)} for a in range(3) for b in range(2)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    tasks = {
        "local_choice": {
            "output_type": "multiple_choice", "doc_to_target": "target", "doc_to_choice": [str(n) for n in range(4)],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "local_answers": {
            "output_type": "generate_until", "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return str(folder)


@torch.no_grad()
def test_a_stage_is_loaded_as_one_model(run):
    whole = PeftModel.from_pretrained(tiny_llama(), run / "stage-1").eval()
    torch.testing.assert_close(load_stage(run, 1)(INPUT).logits, whole(INPUT).logits, rtol=1e-4, atol=1e-5)
    small = load_submodel(tiny_llama(), run, 1)
    torch.testing.assert_close(
        load_stage(run, 1, submodel=True)(INPUT).logits, small(INPUT).logits, rtol=1e-4, atol=1e-5
    )


def test_tasks_are_scored(run, tokenizer, local_tasks):
    model = load_stage(run, 1, submodel=True)
    scores = run_tasks(model, tokenizer, ["local_choice", "local_answers"], include_path=local_tasks)
    found = {(score.task, score.metric): score for score in scores}
    assert set(found) == {("local_choice", "acc"), ("local_answers", "exact_match")}
    assert 0 <= found["local_choice", "acc"].value <= 1
    assert found["local_choice", "acc"].version == "1.0"
    assert found["local_choice", "acc"].error is not None
    assert found["local_choice", "acc"].value == _by_hand(model, tokenizer)


@torch.no_grad()
def _by_hand(model, tokenizer) -> float:
    """How often the right number is the likeliest of four."""
    right = []
    for a in range(3):
        for b in range(2):
            prompt = tokenizer(f"{a} plus {b}?")["input_ids"]
            likely = []
            for number in range(4):
                answer = tokenizer(f"{a} plus {b}? {number}")["input_ids"][len(prompt) :]
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                likely.append(sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)))
            right.append(max(range(4), key=likely.__getitem__) == a + b)
    return pytest.approx(sum(right) / len(right))


def test_an_unknown_task_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="knows no task nonsense"):
        run_tasks(tiny_llama(), tokenizer, ["nonsense"])


def test_scores_go_into_the_card(run):
    path = run / "stage-1" / "README.md"
    before = ModelCard.load(path)
    for value in (0.25, 0.5):
        add_to_card(
            path, "run", [Score("bbh", "exact_match", value, 0.1, "1")], "stage 1, full depth", "text-generation"
        )
    add_to_card(path, "run", [Score("bbh", "exact_match", 0.1, None, "1")], "stage 1, submodel", "text-generation")
    card = ModelCard.load(path)
    found = [(each.dataset_config, each.metric_value) for each in card.data.eval_results if each.dataset_type == "bbh"]
    assert found == [("stage 1, full depth", 0.5), ("stage 1, submodel", 0.1)]
    assert len(card.data.eval_results) == len(before.data.eval_results) + 2
    assert card.text == before.text
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}"])
def test_questions_are_answered_turn_by_turn(run, tokenizer, tmp_path, template):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template
    path = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Count to three.", "And back."]},
        {"question_id": 82, "category": "maths", "turns": ["1 + 1?"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = read_questions(path)
    answers = answer_questions(load_stage(run, 2), tokenizer, questions, max_new_tokens=4)
    assert [len(turns) for turns in answers] == [2, 1]
    write_answers(tmp_path / "model_answer" / "mine.jsonl", questions, answers, "mine")
    written = [json.loads(line) for line in (tmp_path / "model_answer" / "mine.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in written] == [81, 82]
    assert [row["choices"] for row in written] == [[{"index": 0, "turns": turns}] for turns in answers]
    assert {row["model_id"] for row in written} == {"mine"}
    path.write_text('{"question_id": 1}')
    with pytest.raises(ValueError, match="needs `question_id` and `turns`"):
        read_questions(path)
