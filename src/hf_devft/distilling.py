"""`DistillationMixin`: where the layers grow, the server teaches the larger submodel what the smaller one answers."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from hf_devft.configuration import StageConfig, refuse
from hf_devft.federation.ledger import flops_per_token, forward_flops
from hf_devft.federation.methods import FederatedMethod
from hf_devft.generation import continuations, prompt_and_answer
from hf_devft.metrics import IGNORED
from hf_devft.stages.adapter import adapter_state, load_adapter_state
from hf_devft.stages.distillation import distil
from hf_devft.stages.layer_stack import LayerStack


# Tasks whose rows are prompts and answers; None is that of a trainer that says nothing.
_ANSWERING = (None, "text-generation")


class DistillationMixin:
    """Distillation on the server's own texts, of which no label is used; a federated precedent is FedDF (Lin et al.
    2020, arXiv 2006.07242), which distils many clients' models into one."""

    def _check_distillation(self, method: FederatedMethod) -> None:
        """Refuse what distillation cannot be joined with, if it is asked for.

        Raises:
            ValueError: no texts; a model or method in which a submodel is more than its logits and its adapter.
        """
        args, rows, config = self.args, self.calibration_dataset, self.model.config
        if not args.distillation_steps:
            return
        answers = args.task in _ANSWERING and isinstance(rows, Dataset)
        kind = getattr(config, "problem_type", None)
        no_class = kind in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1
        obstacles = {
            "there is but one stage: leave it out": len(self.stages) == 1,
            "it asks texts of the server's own: pass `calibration_dataset`, one dataset that is not empty": (
                not isinstance(rows, Dataset) or not len(rows)
            ),
            "encoded rows of `calibration_dataset` must say where a prompt ends: give `labels`, -100 in it": (
                answers and "labels" not in rows.column_names
            ),
            "it generates answers: pass `processing_class`": answers and self.processing_class is None,
            "a decoder reads answers, which are not known: leave it out": config.is_encoder_decoder,
            "it compares what a model says of classes of which one is right: leave it out": no_class,
            "fp16 loses small gradients, which nothing scales there: use bf16": (
                self.accelerator.mixed_precision == "fp16"
            ),
            f"the server may not change the adapter of federated_method={args.federated_method!r}: leave one out": (
                method.factors or method.needs_room or not method.optimizable
            ),
        }
        refuse(f"distillation_steps={args.distillation_steps}", obstacles)

    def _distil(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack, student: PeftModel) -> float:
        """Teach `student`, the submodel of `stage`, what that of the stage before answers. Returns the FLOPs."""
        self._seed_round()  # collators and dropout may draw
        flops, taught = 0.0, None
        if self.is_world_process_zero():
            teacher = self._submodel_of(self.stages[stage.stage - 2], base, stack).to(self.args.device)
            teacher.requires_grad_(False)
            batches, flops = self._questions(teacher, seed=self.args.seed + stage.stage)
            positions = distil(
                teacher,
                student.to(self.args.device),
                map(self._without_labels, batches),
                self.args.distillation_steps,
                self.args.learning_rate,
                self._autocast,
            )
            flops += positions * (forward_flops(teacher) + sum(flops_per_token(student)))
            taught = adapter_state(student)
        # Machines may differ in their last bits: the main process's adapter is everyone's.
        taught, flops = broadcast_object_list([taught, flops])
        load_adapter_state(student, taught)
        self._seed_round()
        return flops

    def _without_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}

    def _questions(self, teacher: PeftModel, seed: int) -> tuple[DataLoader, float]:
        """(as many batches as there are steps, FLOPs); answers to prompts are the teacher's own."""
        args, rows, flops = self.args, self._calibration_rows(), 0.0
        if args.task in _ANSWERING:
            pairs = list(map(prompt_and_answer, rows))
            room = args.max_length - args.generation_max_new_tokens
            asked = {index: prompt[-room:] for index, (prompt, _) in enumerate(pairs) if prompt}
            with self._autocast():
                answers = continuations(
                    teacher,
                    self.processing_class,
                    list(asked.values()),
                    args.generation_max_new_tokens,
                    args.eval_batch_size,
                )
            told = {index: prompt + answers[place] for place, (index, prompt) in enumerate(asked.items())}
            flops = sum(map(len, told.values())) * forward_flops(teacher)
            texts = [told.get(index, whole) for index, (_, whole) in enumerate(pairs)]
            rows = Dataset.from_dict({"input_ids": texts, "labels": [[IGNORED] * len(text) for text in texts]})
        sampler = RandomSampler(
            rows,
            num_samples=args.distillation_steps * args.train_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )
        rows = self._remove_unused_columns(rows, description="Distillation")
        loader = DataLoader(rows, batch_size=args.train_batch_size, sampler=sampler, collate_fn=self.data_collator)
        return loader, flops
