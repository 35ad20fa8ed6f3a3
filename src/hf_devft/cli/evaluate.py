"""Public benchmarks of a stage: lm-eval's tasks into its model card, answers for the judges of Vicuna- and MT-Bench.

    pip install 'hf-devft[benchmarks]'
    devft evaluate --run outputs/quickstart --stage 2 --tasks mmlu truthfulqa_mc2 bbh ifeval
    devft evaluate --run me/llama-devft --stage 1 --submodel true --tasks mmlu --push_to_hub true
    devft evaluate --run outputs/quickstart --stage 3 --questions mt_bench/question.jsonl

Scores go into the metadata of the stage's card, and of the run's, where the stage is its newest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from rich.console import Console
from transformers import AutoTokenizer

from hf_devft import StageConfig
from hf_devft.cli.arguments import OneLineParser
from hf_devft.cli.errors import one_line_errors
from hf_devft.configuration.devft_config import as_mapping
from hf_devft.run.benchmarks import (
    add_to_card,
    answer_questions,
    cards_of,
    load_stage,
    push_scores,
    read_questions,
    require_lm_eval,
    run_tasks,
    write_answers,
)
from hf_devft.run.tables import make_table


@dataclass
class EvaluationArguments:
    """What to measure, of what."""

    run: str = field(metadata={"help": "A run's output folder, or its repository."})
    stage: int = field(metadata={"help": "Which stage, from 1."})
    submodel: bool = field(default=False, metadata={"help": "Its submodel, not the full base with its adapter."})
    base: str | None = field(default=None, metadata={"help": "The base, where it is elsewhere than in training."})
    model_init_kwargs: str | None = field(
        default=None, metadata={"help": "JSON: how it is loaded, such as the dtype or quantisation of the training."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "lm-eval's, such as mmlu bbh ifeval."})
    include_path: str | None = field(default=None, metadata={"help": "A folder of lm-eval tasks of one's own."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt; default: the task's."})
    limit: int | None = field(default=None, metadata={"help": "Rows of each task; default: all."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Ask by the tokenizer's chat template."})
    questions: str | None = field(default=None, metadata={"help": "FastChat's question.jsonl, to be answered."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=8, metadata={"help": "Rows at a time."})
    push_to_hub: bool = field(default=False, metadata={"help": "Put scores into the repository's card, too."})


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say; see `EvaluationArguments`."""
    with one_line_errors():
        parser = OneLineParser(EvaluationArguments, prog="devft evaluate")
        evaluate(parser.parse_args_into_dataclasses(list(argv))[0])


def evaluate(options: EvaluationArguments) -> None:
    """Measure a stage, and write its scores and answers.

    Raises:
        ValueError: nothing to do, or not with this stage.
    """
    if not options.tasks and not options.questions:
        raise ValueError("nothing to do: give `--tasks`, `--questions` or both.")
    how = as_mapping("model_init_kwargs", options.model_init_kwargs)
    if options.tasks:
        require_lm_eval()  # before anything is loaded
    local = Path(options.run).is_dir()
    if options.push_to_hub and local:
        raise ValueError(f"push_to_hub needs a repository, but {options.run} is a folder: give its name as `--run`.")
    questions = read_questions(Path(options.questions)) if options.questions else []
    record = StageConfig.from_pretrained(options.run, subfolder=f"stage-{options.stage}")
    if record.task != "text-generation":
        raise ValueError(f"stage {options.stage} is for {record.task}: these benchmarks ask causal language models.")
    tokenizer = AutoTokenizer.from_pretrained(options.run)
    model = load_stage(options.run, options.stage, options.submodel, options.base, model_init_kwargs=how)
    of = f"stage {options.stage}, {'submodel' if options.submodel else 'full depth'}"
    if options.tasks:
        scores = run_tasks(
            model,
            tokenizer,
            options.tasks,
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            apply_chat_template=options.apply_chat_template,
        )
        rows = [
            [score.task, score.metric, f"{score.value:.4f}", "" if score.error is None else f"{score.error:.4f}"]
            for score in scores
        ]
        Console().print(make_table(of, ["task", "metric", "score", "s.e."], rows))
        if local:
            folder = Path(options.run)
            for card in cards_of(options.stage, lambda name: (folder / name).exists()):
                add_to_card(folder / card, folder.name, scores, of, record.task)
        if options.push_to_hub:
            print(push_scores(HfApi(), options.run, options.stage, scores, of, record.task))
    if options.questions:
        name = f"{Path(options.run).name}-stage-{options.stage}{'-submodel' if options.submodel else ''}"
        answers = answer_questions(model, tokenizer, questions, options.max_new_tokens, options.batch_size)
        target = Path(options.run if local else ".", "model_answer", f"{name}.jsonl")
        write_answers(target, questions, answers, name)
        print(f"Answers are in {target}")
