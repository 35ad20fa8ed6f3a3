"""The full model's evaluation at a stage's end, and metrics over several evaluation sets, such as the clients'."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import CallbackHandler

from hf_devft.configuration import DevFTConfig
from hf_devft.tasks.generation import exact_match
from hf_devft.trainer.interface import FederatedTrainer


_WORST: dict[str, Callable] = {"loss": max, "exact_match": min, "accuracy": min}
_TIMES = ("runtime", "_per_second", "_time")


def over_the_sets(metrics: Mapping[str, float], prefix: str, names: Collection[str]) -> dict[str, float]:
    """Compute the mean of what was measured on several evaluation sets, but of times, and of losses, matches and
    accuracies the worst.

    Args:
        metrics: {"{prefix}_{name of a set}_{metric}": value}.
        names: of the sets.
    """
    found: dict[str, float] = {}
    starts = [f"{prefix}_{of}_" for of in names]
    measured = {key.removeprefix(start) for start in starts for key in metrics if key.startswith(start)}
    for name in sorted(name for name in measured if not name.endswith(_TIMES)):
        values = [metrics[start + name] for start in starts if start + name in metrics]
        if len(values) < len(starts) and name not in _WORST:  # a set's name may begin another's
            continue
        found[f"{prefix}_{name}"] = float(np.mean(values))
        if name in _WORST:
            found[f"{prefix}_worst_{name}"] = _WORST[name](values)
    return found


def submodel_metrics(metrics: Mapping[str, float], datasets: Any) -> dict[str, float]:
    """Choose what a stage's record has of an evaluation of its submodel: each set's metrics, and the mean loss."""
    derived = over_the_sets(metrics, "eval", datasets) if isinstance(datasets, dict) else {}
    kept = {key: value for key, value in metrics.items() if key.startswith("eval_") and key not in derived}
    return kept | {key: derived[key] for key in ("eval_loss",) if key in derived}


def named_sets(datasets: Any) -> dict[str, Dataset]:
    """Evaluation sets by their names; that of a single one is empty."""
    return datasets if isinstance(datasets, dict) else {"": datasets}


def number_of_rows(datasets: Any) -> int:
    """Count the rows of all evaluation sets together; 0 where there are none."""
    return 0 if datasets is None else sum(map(len, named_sets(datasets).values()))


def evaluation_share(args: DevFTConfig) -> tuple[int, int]:
    """(index, count) of processes that share what is evaluated: one, where all hold only a part of the model."""
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    return (0, 1) if sharded else (args.process_index, args.world_size)


@contextmanager
def early_stopping_waits(handler: CallbackHandler) -> Iterator[None]:
    """Within this context, early stopping is not told of evaluations, as each set's alone would count for all, or lack
    its metric."""
    everyone = handler.callbacks
    handler.callbacks = [each for each in everyone if not isinstance(each, EarlyStoppingCallback)]
    try:
        yield
    finally:
        handler.callbacks = everyone


@contextmanager
def each_batch_alone(args: DevFTConfig) -> Iterator[None]:
    """Within this context, a batch's loss does not depend on the tokens that other processes evaluate at the time."""
    averaging, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = averaging


def evaluate_full_depth(
    trainer: FederatedTrainer, stage: int, known: Mapping[str, float], ignore_keys: list[str] | None = None
) -> dict[str, float]:
    """Measure the model in use, which is the full one, on every evaluation set, and log it as of a stage.

    Args:
        known: {"eval_...": value}, what was measured of the same model already, and is not measured again.
        ignore_keys: of the model's outputs, see `Trainer.evaluate`.

    Returns:
        {"eval_full_...": value}.
    """
    args = trainer.args
    metrics: dict[str, float] = {}
    for name, dataset in named_sets(trainer.eval_dataset).items():
        short, prefix = (f"eval_{name}", f"eval_full_{name}") if name else ("eval", "eval_full")
        found = {key.replace(short, prefix, 1): value for key, value in known.items() if key.startswith(f"{short}_")}
        if f"{prefix}_loss" not in found:
            found = trainer.evaluation_loop(
                trainer.get_eval_dataloader(dataset),
                description="Evaluation at full depth",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=prefix,
            ).metrics
        metrics |= {key: value for key, value in found.items() if not key.endswith("preparation_time")}
        if args.predict_with_generate:
            metrics[f"{prefix}_exact_match"] = exact_match(
                trainer.model,
                trainer.processing_class,
                dataset,
                args.generation_max_new_tokens,
                args.eval_batch_size,
                evaluation_share(args),
            )
        trainer.control = trainer.callback_handler.on_predict(args, trainer.state, trainer.control, found)
    if isinstance(trainer.eval_dataset, dict):
        metrics |= over_the_sets(metrics, "eval_full", trainer.eval_dataset)
    trainer.log(metrics | {"stage": stage})
    return metrics
