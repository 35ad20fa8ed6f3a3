"""`DistillationMixin`: where the layers grow, the server teaches the larger submodel what the smaller one answers."""

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from hf_devft.configuration import StageConfig
from hf_devft.federation.ledger import flops_per_token
from hf_devft.federation.methods import FederatedMethod
from hf_devft.generation import continuations, prompt_of
from hf_devft.metrics import IGNORED
from hf_devft.stages.adapter import adapter_state, load_adapter_state
from hf_devft.stages.distillation import distil
from hf_devft.stages.layer_stack import LayerStack


class DistillationMixin:
    """Distillation on the server's own texts, of which no label is used; a federated precedent is FedDF (Lin et al.
    2020, arXiv 2006.07242), which distils many clients' models into one."""

    def _check_distillation(self, method: FederatedMethod) -> None:
        """Refuse what distillation cannot be joined with, if it is asked for.

        Raises:
            ValueError: no texts; a model or method in which a submodel is more than its logits and its adapter.
        """
        asked = f"distillation_steps={self.args.distillation_steps}"
        if not self.args.distillation_steps:
            return
        if self.calibration_dataset is None:
            raise ValueError(f"{asked} needs texts of the server's own: pass `calibration_dataset`.")
        if self.model.config.is_encoder_decoder:
            raise ValueError(
                f"{asked} compares answers to what a model reads, and a decoder reads answers: leave it out."
            )
        if method.factors or method.needs_room or not method.optimizable:
            raise ValueError(
                f"{asked} changes the global adapter, which federated_method={self.args.federated_method!r} does not "
                "let a server do: leave one out."
            )

    def _distil(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack, student: PeftModel) -> float:
        """Teach `student`, the submodel of `stage`, what that of the stage before answers. Returns the FLOPs."""
        flops, taught = 0.0, None
        if self.is_world_process_zero():
            before = self.stages[stage.stage - 2]
            teacher = self._submodel_of(before, base, stack, adapter_fusion="anchor").to(self.args.device)
            teacher.requires_grad_(False)
            rows, flops = self._questions(teacher, seed=self.args.seed + stage.stage)
            batches = (
                {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}
                for batch in rows
            )
            positions = distil(
                teacher,
                student.to(self.args.device),
                batches,
                self.args.distillation_steps,
                self.args.learning_rate,
                self.compute_loss_context_manager,
            )
            flops += positions * (_forward_flops(teacher) + sum(flops_per_token(student)))
            taught = {key: tensor.cpu() for key, tensor in adapter_state(student).items()}
        # Machines may differ in their last bits: the main process's adapter is everyone's.
        taught, flops = broadcast_object_list([taught, flops])
        load_adapter_state(student, taught)
        return flops

    def _questions(self, teacher: PeftModel, seed: int) -> tuple[DataLoader, float]:
        """(as many batches as there are steps, FLOPs); answers to prompts are the teacher's own."""
        args, rows, flops = self.args, self._calibration_rows(), 0.0
        if args.task in (None, "text-generation"):
            prompts = [prompt_of(row) for row in rows]
            asked = [index for index, prompt in enumerate(prompts) if prompt]
            answers = continuations(
                teacher,
                self.processing_class,
                [prompts[index] for index in asked],
                args.generation_max_new_tokens,
                args.eval_batch_size,
            )
            texts = [list(row["input_ids"]) for row in rows]
            for place, index in enumerate(asked):
                texts[index] = prompts[index] + answers[place]
            flops = sum(len(texts[index]) for index in asked) * _forward_flops(teacher)
            rows = Dataset.from_dict({"input_ids": texts, "labels": [[IGNORED] * len(text) for text in texts]})
        sampler = RandomSampler(
            rows,
            num_samples=args.distillation_steps * args.train_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )
        rows = self._remove_unused_columns(rows, description="Distillation")
        return DataLoader(
            rows, batch_size=args.train_batch_size, sampler=sampler, collate_fn=self.data_collator
        ), flops


def _forward_flops(model: PeftModel) -> float:
    """Of one position, without gradients: half of what frozen weights take in training."""
    return sum(flops_per_token(model)) / 2
