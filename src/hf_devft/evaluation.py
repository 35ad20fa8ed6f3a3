"""Between rounds the stage's submodel is measured, at a stage's end the full model, also by greedy generation."""

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.configuration import StageConfig
from hf_devft.generation import continuations, prompt_and_answer
from hf_devft.metrics import ExactMatch


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    process: tuple[int, int] = (0, 1),
) -> tuple[list[str], list[str]]:
    """Greedy answers to the rows' prompts, and the reference answers, both as text, in the rows' order.

    Args:
        dataset: columns `input_ids` and `labels`; the answer is what is labelled at the end (of a chat, the last
            turn), the prompt what stands before.
        process: this process's index and how many there are; they share the rows, and each gets all answers.

    Raises:
        ValueError: a row has no prompt.
    """
    pairs = list(map(prompt_and_answer, dataset))
    prompts = [prompt for prompt, _ in pairs]
    if not all(prompts):
        raise ValueError("some rows have no prompt that could be answered: all of their text is labelled.")
    tokens = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, process)
    answers = {index: tokenizer.decode(answer, skip_special_tokens=True) for index, answer in tokens.items()}
    parts = gather_object([answers]) if process[1] > 1 else [answers]
    texts = [text for _, text in sorted(item for part in parts for item in part.items())]
    return texts, [tokenizer.decode(reference, skip_special_tokens=True) for _, reference in pairs]


class EvaluationMixin:
    """How a `DevFTMixin` evaluates."""

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """As `Trainer`'s; a stop that it brings about ends the stage, and the run only in the last one."""
        stopping = self.control.should_training_stop
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        metrics |= self._over_the_sets(metrics, "eval")
        if self.control.should_training_stop and not stopping:
            self.control.should_training_stop = False
            self.control.should_epoch_stop = True
        self._peak_memory.release()
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        """As `Trainer`'s, but a batch's loss never depends on what other processes evaluate at the time."""
        if self._running is None:
            self._make_whole()
        averaging, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = averaging

    def _evaluate_full_depth(self, stage: int) -> dict[str, float]:
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            prefix = f"eval_full_{name}" if name else "eval_full"
            output = self.evaluation_loop(
                self.get_eval_dataloader(dataset),
                description="Evaluation at full depth",
                prediction_loss_only=True if self.compute_metrics is None else None,
                metric_key_prefix=prefix,
            )
            metrics |= {key: value for key, value in output.metrics.items() if not key.endswith("preparation_time")}
            if self.args.predict_with_generate:
                metrics[f"{prefix}_exact_match"] = self._exact_match(dataset)
            self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        metrics |= self._over_the_sets(metrics, "eval_full")
        self.log(metrics | {"stage": stage})
        return metrics

    def _over_the_sets(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """The mean and the worst of what was measured on several evaluation sets, such as the clients'."""
        found = {}
        if isinstance(self.eval_dataset, dict):
            for name, worst in (("loss", max), ("exact_match", min), ("accuracy", min)):
                keys = [f"{prefix}_{of}_{name}" for of in self.eval_dataset]
                if values := [metrics[key] for key in keys if key in metrics]:
                    found |= {f"{prefix}_{name}": float(np.mean(values)), f"{prefix}_worst_{name}": worst(values)}
        return found

    def _exact_match(self, dataset: Dataset) -> float:
        answers, references = generate_answers(
            self.model,
            self.processing_class,
            dataset,
            self.args.generation_max_new_tokens,
            self.args.eval_batch_size,
            process=self._evaluation_share(),
        )
        return ExactMatch().compute(predictions=answers, references=references)["exact_match"]

    def _evaluation_share(self) -> tuple[int, int]:
        """(index, count) of processes that share what is evaluated: none where all hold only a part of the model."""
        sharded = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return (0, 1) if sharded else (self.args.process_index, self.args.world_size)

    def _submodel_metrics(self, stage: StageConfig) -> dict[str, float]:
        """The submodel's evaluation in the round that the stage hands on: the best checkpointed one, or the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        rounds = {row["step"] for row in self.state.log_history if row.get("stage") == stage.stage}
        step = best or max(rounds, default=0)
        rows = [row for row in self.state.log_history if row["step"] == step and row.get("stage") == stage.stage]
        metrics = {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}
        losses = [value for key, value in metrics.items() if key.endswith("_loss")]
        return metrics | {"eval_loss": float(np.mean(losses))} if losses else {}
