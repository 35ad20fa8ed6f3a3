"""What a recipe's arguments ask for: the data, the plan, the trainer."""

from dataclasses import replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, EarlyStoppingCallback

import hf_devft
from hf_devft.cli.arguments import TRAINERS, RecipeArguments
from hf_devft.configuration import DevFTConfig
from hf_devft.embedded import resolve_model_name, task_dataset
from hf_devft.embedded.families import preference_pairs
from hf_devft.federation.partition import DEFAULT_NUM_CLIENTS, ClientData
from hf_devft.hub.download import fetch_adapter
from hf_devft.models.adapter_files import load_adapter
from hf_devft.models.gguf import locate
from hf_devft.models.streaming import empty_base, where_from
from hf_devft.run.plan import RunPlan, plan_run
from hf_devft.tasks import answers_prompts, task_named
from hf_devft.tasks.data import load_datasets, load_files, tokenize, unconverted
from hf_devft.trainer.devft_trainer import DevFTTrainer, add_placeholder_answers, with_labels
from hf_devft.trainer.interface import ClientLink
from hf_devft.trainer.mixin import DevFTMixin
from hf_devft.trainer.preparation import check_enough, clients_of


DEFAULT_EVAL_FRACTION = 0.1  # our choice, a common one


class LastingPatience(EarlyStoppingCallback):
    """Early stopping that counts on where a run goes on, with the patience that it is given there."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        known = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = known.get("early_stopping_patience_counter", 0)


def load_data(recipe: RecipeArguments, args: DevFTConfig) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Load (train, evaluation, calibration) rows; evaluation may be missing. Calibration rows without a file are held
    out of training.

    Raises:
        ValueError: files that cannot be read, or that the run has no use for.
    """
    task = task_named(args.task)
    to_columns = task.to_columns if recipe.trainer == "devft" else unconverted
    asked, calibration = args.asks_server_texts, _calibration_rows(recipe, args)
    evaluation = load_files(recipe.eval_file, to_columns) if recipe.eval_file else None
    if recipe.train_file or recipe.dataset_name:
        if recipe.train_file:
            train = load_files(recipe.train_file, to_columns)
        else:
            names = (recipe.dataset_name, recipe.dataset_config)
            train = load_datasets(*names, recipe.dataset_train_split, to_columns)
            if recipe.dataset_eval_split:
                evaluation = load_datasets(*names, recipe.dataset_eval_split, to_columns)
        part = _part_held_out(recipe, args) if evaluation is None else 0.0
        if args.is_private and (part or (asked and calibration is None)):
            raise ValueError(
                "a private run cannot hold out rows of its clients, which no noise would cover: give `eval_file` (or "
                "`eval_fraction: 0` with `eval_strategy: no`), and `calibration_file` where the server reads texts."
            )
        if part:
            train, evaluation = _held_out(train, part, args)
        if calibration is not None or not asked:
            return train, evaluation, calibration
        train, calibration = _split(train, args.calibration_samples, args)
        return train, evaluation, calibration
    as_asked = preference_pairs if recipe.trainer == "dpo" else lambda rows: rows
    train = as_asked(task_dataset(recipe.task_rows, recipe.task_families, seed=args.seed))
    if evaluation is None and not args.client_eval_size:
        evaluation = as_asked(_made_up_evaluation(recipe))
    if calibration is None:
        calibration = as_asked(_made_up_calibration(recipe, args))
    return train, evaluation, calibration


def _part_held_out(recipe: RecipeArguments, args: DevFTConfig) -> float:
    """The part of the rows to evaluate on, where there are no others for that.

    Raises:
        ValueError: evaluation is asked for, and there would be none.
    """
    has_others = args.eval_strategy == "no" or args.client_eval_size
    if recipe.eval_fraction is None:
        return 0.0 if has_others else DEFAULT_EVAL_FRACTION
    if not recipe.eval_fraction and not has_others:
        raise ValueError(
            f"eval_fraction={recipe.eval_fraction} leaves nothing to evaluate on: give an `eval_file`, or "
            "`eval_strategy: no`."
        )
    return recipe.eval_fraction


def _held_out(rows: Dataset, fraction: float, args: DevFTConfig) -> tuple[Dataset, Dataset]:
    """Split rows in those to train and those to evaluate on.

    Raises:
        ValueError: one of both would be empty.
    """
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(
            f"eval_fraction={fraction} of {len(rows)} rows leaves none to {'train' if count else 'evaluate'} on: give "
            "more rows, another part, or an `eval_file`; 0 evaluates nothing, with `eval_strategy: no`."
        )
    return _split(rows, count, args)


def _split(rows: Dataset, count: int, args: DevFTConfig) -> tuple[Dataset, Dataset]:
    """(the others, `count` rows drawn by the seed). An owner keeps the rows that would be all it has.

    Raises:
        ValueError: none would be left.
    """
    parts = rows.train_test_split(test_size=count, seed=args.seed)
    train, drawn, column = parts["train"], parts["test"], args.partition_column
    if args.partition != "natural" or column not in rows.column_names:
        return train, drawn
    owners, left = drawn[column][:], set(train[column][:])
    back = [index for index, owner in enumerate(owners) if owner not in left]
    if len(back) == len(drawn):
        raise ValueError(
            f"the {count} rows to hold out are all that their owners (column {column!r}) have: give an `eval_file` or "
            "a `calibration_file`, whichever they are for."
        )
    if not back:
        return train, drawn
    taken = [index for index, owner in enumerate(owners) if owner in left]
    return concatenate_datasets([train, drawn.select(back)]), drawn.select(taken)


def load_server_data(recipe: RecipeArguments, args: DevFTConfig) -> tuple[Dataset | None, Dataset | None]:
    """Load the (evaluation, calibration) rows of a server whose clients have theirs themselves: of files, or made-up
    tasks for the embedded base; either may be missing.

    Raises:
        ValueError: files that cannot be read, or rows to train on.
    """
    if recipe.train_file or recipe.dataset_name:
        raise ValueError(
            "the clients have their rows themselves: leave `train_file` and `dataset_name` out, and give the server's "
            "own as `eval_file` and `calibration_file`."
        )
    evaluation, calibration = None, _calibration_rows(recipe, args)
    if recipe.eval_file:
        evaluation = load_files(recipe.eval_file, task_named(args.task).to_columns)
    if recipe.model_name_or_path != "embedded":
        return evaluation, calibration
    if evaluation is None:
        evaluation = _made_up_evaluation(recipe)
    if calibration is None and args.asks_server_texts:
        calibration = _made_up_calibration(recipe, args)
    return evaluation, calibration


def _calibration_rows(recipe: RecipeArguments, args: DevFTConfig) -> Dataset | None:
    """The rows of `calibration_file`, where it is given.

    Raises:
        ValueError: nothing reads them.
    """
    if not recipe.calibration_file:
        return None
    if not args.asks_server_texts or recipe.trainer != "devft":
        raise ValueError(
            'calibration_file is read for grouping="calibrated", fusion="bridge", healing_steps and '
            "distillation_steps of --trainer devft: set one of them, or leave it out."
        )
    task = task_named(args.task)
    return load_files(recipe.calibration_file, lambda rows: task.to_columns(add_placeholder_answers(task, rows, args)))


def _made_up_evaluation(recipe: RecipeArguments) -> Dataset:
    return task_dataset(recipe.task_eval_rows, recipe.task_families, split="test")


def _made_up_calibration(recipe: RecipeArguments, args: DevFTConfig) -> Dataset:
    return task_dataset(args.calibration_samples, recipe.task_families, seed=args.seed + 1)


def make_plan(recipe: RecipeArguments, args: DevFTConfig) -> RunPlan:
    """Plan what the run will cost; data on the Hub is not downloaded for it."""
    path, options = locate(resolve_model_name(recipe.model_name_or_path), args.model_init_kwargs or {})
    task = task_named(args.task)
    config = recipe.lora_config(args.task)
    if recipe.adapter_name_or_path:
        config = load_adapter(fetch_adapter(recipe.adapter_name_or_path, token=args.hub_token))[0]
        config.inference_mode = False
    clients = None
    if task.classes and recipe.train_file:
        options = with_labels(task, load_data(recipe, args)[0], path, options, args.is_private)
    if not recipe.dataset_name and answers_prompts(args.task) and recipe.trainer == "devft":
        tokenizer = AutoTokenizer.from_pretrained(path, **where_from(options))
        clients = clients_of(args, load_data(recipe, args)[0])
        check_enough(args, len(clients.rows))
        clients = replace(clients, dataset=tokenize(clients.dataset, tokenizer, args.max_length))
    elif args.partition != "natural":
        check_enough(args, args.num_clients or DEFAULT_NUM_CLIENTS)
    return plan_run(args, empty_base(path, task.auto_class, **options), config, clients, recipe.trainer)


def _check_metrics_options(args: DevFTConfig) -> None:
    """Refuse options by which a `compute_metrics` is given its batches in another form than a task's own takes."""
    for option, usual in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
        if getattr(args, option) != usual:
            raise ValueError(f"{option} is for a `compute_metrics` of your own, in Python: leave it out.")


def make_trainer(
    recipe: RecipeArguments,
    args: DevFTConfig,
    remote_clients: ClientLink | None = None,
    data: tuple[Dataset | ClientData, Dataset | None, Dataset | None] | None = None,
) -> DevFTMixin:
    """Make the trainer of a run.

    Args:
        remote_clients: the way to clients that are elsewhere.
        data: (rows to train on, or `ClientData` of who has them; rows to evaluate on; the server's own rows); default:
            see `load_data`.

    Raises:
        ValueError: arguments or data that cannot be trained; before any work is spent.
    """
    if recipe.dataset_name and args.card_datasets is None:
        # The Hub knows no local folders.
        args.card_datasets = [name for name in recipe.dataset_name if not Path(name).exists()] or None
    patience = recipe.early_stopping_patience
    if patience is not None and (patience < 1 or not args.load_best_model_at_end):
        raise ValueError(
            f"early_stopping_patience={patience} ends a stage after its best round: give 1 or more, and set "
            "`load_best_model_at_end`, and `save_strategy` as `eval_strategy`."
        )
    _check_metrics_options(args)
    train, evaluation, calibration = load_data(recipe, args) if data is None else data
    if evaluation is None and not args.client_eval_size and args.eval_strategy == "no":
        args.eval_on_start = False  # which configs ask for
    given = {"train_dataset": train, "eval_dataset": evaluation, "calibration_dataset": calibration}
    if patience is not None:
        given["callbacks"] = [LastingPatience(patience)]
    if recipe.trainer != "devft":
        if recipe.adapter_name_or_path:
            raise ValueError(
                f"--trainer {recipe.trainer} starts with a new adapter: merge {recipe.adapter_name_or_path} into the "
                "base (examples/merge_and_save.py), and give that as `model_name_or_path`."
            )
        trainer = getattr(hf_devft, f"{TRAINERS[recipe.trainer]}Trainer")
        return trainer(recipe.model_name_or_path, args, peft_config=recipe.lora_config(args.task), **given)
    task = task_named(args.task)
    return DevFTTrainer(
        recipe.model_name_or_path,
        args,
        peft_config=recipe.adapter_name_or_path or recipe.lora_config(args.task),
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits,
        remote_clients=remote_clients,
        **given,
    )
