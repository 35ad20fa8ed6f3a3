"""Public benchmarks of what a run has left: lm-eval's tasks, and answers for the judges of Vicuna- and MT-Bench."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.configuration import StageConfig
from hf_devft.embedded import resolve_model_name
from hf_devft.files import atomic_file
from hf_devft.hub.download import fetch_adapter
from hf_devft.models.adapter import attach_adapter, own_adapted_weights
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.streaming import load_base
from hf_devft.run.loading import load_submodel
from hf_devft.tasks import TASKS
from hf_devft.tasks.data import instruction_prompt, without_end
from hf_devft.tasks.generation import continuations


@dataclass(frozen=True)
class Score:
    """What a task's metric came to.

    Attributes:
        task, metric: as lm-eval names them, with its filter where it has several.
        value: of the metric; error: its standard error, where that is known.
        version: of the task.
    """

    task: str
    metric: str
    value: float
    error: float | None
    version: str


def load_stage(
    name_or_path: str | Path,
    stage: int,
    submodel: bool = False,
    base: str | None = None,
    token: str | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """Load what a stage has left, on an accelerator where there is one: the full base with the stage's adapter, or its
    submodel. In float32 the adapter is merged; in less, small changes would be lost in rounding.

    Args:
        name_or_path: a run's `output_dir`, or its repository. base: where it is now; default: as the stage's record
            has it. token: of the repository. model_init_kwargs: how the base is loaded; give those of the training.

    Raises:
        OSError: there is no such stage.
        ValueError: what is there cannot be read, or no base is known.
    """
    record = StageConfig.from_pretrained(name_or_path, subfolder=f"stage-{stage}", token=token)
    elsewhere, base = base is not None, base or record.base_model_name_or_path
    if base is None:
        raise ValueError(f"stage {stage} of {name_or_path} does not say on which base it was trained: give `base`.")
    revision = {"revision": record.base_model_revision} if record.base_model_revision and not elsewhere else {}
    options = revision | dict(model_init_kwargs or {})
    whole = load_base(resolve_model_name(base), TASKS[record.task].auto_class, record.stack, not submodel, **options)
    if submodel:
        model = load_submodel(whole, name_or_path, stage, token=token)
    else:
        model = attach_adapter(whole, *load_adapter(fetch_adapter(name_or_path, f"stage-{stage}", token=token)))
        own_adapted_weights(model, tied_only=True)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    is_exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return (model.merge_and_unload() if is_exact else model).eval().to(device)


def require_lm_eval() -> None:
    """Raise an ImportError that says what to install, where lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise ImportError("lm-eval is not installed: pip install 'hf-devft[benchmarks]', in a clone '.[benchmarks]'")


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
) -> list[Score]:
    """Run tasks of lm-eval on a causal language model.

    Args:
        tasks: such as "mmlu", "truthfulqa_mc2", "bbh" and "ifeval"; or a group, whose tasks are then scored, too.
        include_path: a folder of tasks of one's own.
        num_fewshot: examples in the prompt; default: as each task has it. limit: rows of each task; default: all.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: it does not know a task.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}: see `lm-eval ls tasks`, or give `include_path`."
        )
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return scores_of(found)


def scores_of(results: dict[str, Any]) -> list[Score]:
    """List the scores in what lm-eval returns."""
    scores = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if kind and not name.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{name}_stderr,{kind}")
                version = str(results.get("versions", {}).get(task, ""))
                metric = name if kind == "none" else f"{name} ({kind})"
                scores.append(Score(task, metric, float(value), error if isinstance(error, float) else None, version))
    return scores


def _model_index(scores: Iterable[Score], of: str, task_type: str) -> list[EvalResult]:
    """Scores as a card's metadata has them.

    Args:
        of: what was measured, such as "stage 2, full depth".
    """
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=score.task,
            dataset_name=score.task,
            dataset_config=of,
            metric_type=score.metric,
            metric_name=f"{score.metric} of {of}",
            metric_value=score.value,
        )
        for score in scores
    ]


def add_to_card(path: Path, name: str, scores: Sequence[Score], of: str, task_type: str) -> None:
    """Put scores into the metadata of a model card, in one move; those of before by the same tasks and metrics go.

    Args:
        name: of the model, where the card does not say.
    """
    card = ModelCard.load(path)
    card.data.model_name = card.data.model_name or name
    new = _model_index(scores, of, task_type)
    kept = [old for old in card.data.eval_results or [] if not any(old.is_equal_except_value(each) for each in new)]
    card.data.eval_results = [*kept, *new]
    with atomic_file(path) as temporary:
        card.save(temporary)


def cards_of(stage: int, exists: Callable[[str], bool]) -> list[str]:
    """List the cards, within a run, that a stage's scores go into: its own, and the root's where it is the newest.

    Args:
        exists: whether the run has a file.
    """
    newest = not exists(f"stage-{stage + 1}/README.md")
    return [f"stage-{stage}/README.md", *(["README.md"] if newest else [])]


def push_scores(api: HfApi, repo_id: str, stage: int, scores: Sequence[Score], of: str, task_type: str) -> str:
    """Put scores into a repository's cards, see `cards_of`, in one commit; returns its address."""
    operations = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cards_of(stage, lambda name: api.file_exists(repo_id, name)):
            path = Path(api.hf_hub_download(repo_id, name, local_dir=folder))
            add_to_card(path, repo_id.rpartition("/")[2], scores, of, task_type)
            operations.append(CommitOperationAdd(name, path))
        commit = api.create_commit(repo_id, operations, commit_message=f"Scores of {of}")
    return commit.commit_url


def answer_questions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> list[list[str]]:
    """Answer questions of one or more turns greedily; returns each question's answers, turn by turn.

    A tokenizer with a chat template is asked by that, any other as rows with `instruction` are.

    Args:
        questions: each with `turns`, as FastChat's `question.jsonl` has them.
    """
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max((len(question["turns"]) for question in questions), default=0)):
        asked = [index for index, question in enumerate(questions) if turn < len(question["turns"])]
        prompts = [_prompt(tokenizer, questions[index]["turns"][: turn + 1], answers[index]) for index in asked]
        told = continuations(model, tokenizer, prompts, max_new_tokens, batch_size)
        for place, index in enumerate(asked):
            answers[index].append(str(tokenizer.decode(told[place], skip_special_tokens=True)).strip())
    return answers


def _prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """The tokens of a conversation whose last turn has no answer yet."""
    if tokenizer.chat_template is None:
        pairs = zip(turns, [*answers, ""], strict=True)
        asked = "\n\n".join(f"{instruction_prompt(turn)}{answer}" for turn, answer in pairs)
        return without_end([tokenizer(asked)["input_ids"]], tokenizer)[0]
    messages = [
        {"role": role, "content": content}
        for pair in zip_longest(turns, answers)
        for role, content in zip(("user", "assistant"), pair, strict=True)
        if content is not None
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write_answers(
    path: Path, questions: Sequence[dict[str, Any]], answers: Sequence[list[str]], model_id: str
) -> None:
    """Write answers as FastChat's judges read them (`model_answer/MODEL.jsonl`), in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w") as file:
        for question, turns in zip(questions, answers, strict=True):
            row = {
                "question_id": question["question_id"],
                "answer_id": uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read FastChat's `question.jsonl`, a question a line.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a line has no `question_id` or no `turns`.
    """
    questions = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not questions or not all({"question_id", "turns"} <= question.keys() for question in questions):
        raise ValueError(f"{path} is no file of questions: every line needs `question_id` and `turns`, as FastChat's.")
    return questions
