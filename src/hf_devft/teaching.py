"""`TeachingMixin`: what the server teaches. A submodel, to stand for the whole base, before anything is learned on
it (healing); a larger submodel, what the smaller one before it answers (distillation)."""

import functools
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from hf_devft.checkpoint import Checkpoint
from hf_devft.configuration import ANSWERING, StageConfig, refuse
from hf_devft.federation.ledger import flops_per_token, forward_flops
from hf_devft.federation.methods import FederatedMethod
from hf_devft.files import link_or_copy
from hf_devft.generation import continuations, prompt_and_answer
from hf_devft.hub.artifacts import SUBMODEL
from hf_devft.metrics import IGNORED
from hf_devft.stages.adapter import adapter_state, load_adapter_state
from hf_devft.stages.distillation import distil
from hf_devft.stages.healing import heal, healed_path, healed_state, load_healed_state, read_healed, save_healed
from hf_devft.stages.layer_stack import LayerStack
from hf_devft.stages.submodel import build_submodel, build_whole, layers_of


# Where a run keeps the layers that it has healed; checkpoints and finished stages have what they need in `submodel/`.
_KEPT = ".healed"


class TeachingMixin:
    """Healing and distillation on the server's own texts, of which no label is used; a federated precedent is FedDF
    (Lin et al. 2020, arXiv 2006.07242), which distils many clients' models into one."""

    _base_answers: Dataset | None = None  # to the server's prompts; the base does not change

    def _check_teaching(self, method: FederatedMethod) -> None:
        """Refuse what the server's teaching cannot be joined with, if it is asked for.

        Raises:
            ValueError: no texts; a model or method in which a submodel is more than its logits and its adapter.
        """
        args, config = self.args, self.model.config
        healing, distillation = args.healing_steps, args.distillation_steps
        common = self._obstacles_to_teaching()
        if healing:
            own = {
                "only a language model says enough of a text, by its next tokens: leave it out": (
                    args.task not in ANSWERING or self.model.get_output_embeddings() is None
                ),
                "it trains all weights of the layers: load the base unquantised": (
                    getattr(self.model.get_base_model(), "is_quantized", False)
                    or not all(parameter.is_floating_point() for parameter in self.model.parameters())
                ),
                "fp16 loses small gradients, which nothing scales there: load the base in bfloat16 or float32": (
                    self.model.dtype == torch.float16
                ),
            }
            refuse(f"healing_steps={healing}", common | own)
        if distillation:
            kind = getattr(config, "problem_type", None)
            no_class = kind in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1
            fixed = method.factors or method.needs_room or not method.optimizable
            own = {
                "it compares what a model says of classes of which one is right: leave it out": no_class,
                f"the server may not change the adapter of federated_method={args.federated_method!r}: leave one "
                "out": fixed,
            }
            refuse(f"distillation_steps={distillation}", common | own)

    def _obstacles_to_teaching(self) -> dict[str, bool]:
        args, rows = self.args, self.calibration_dataset
        answers = args.task in ANSWERING and isinstance(rows, Dataset)
        return {
            "there is but one stage: leave it out": len(self.stages) == 1,
            "it asks texts of the server's own: pass `calibration_dataset`, one dataset that is not empty": (
                not isinstance(rows, Dataset) or not len(rows)
            ),
            "encoded rows of `calibration_dataset` must say where a prompt ends: give `labels`, -100 in it": (
                answers and "labels" not in rows.column_names
            ),
            "it generates answers: pass `processing_class`": answers and self.processing_class is None,
            "a decoder reads answers, which are not known: leave it out": self.model.config.is_encoder_decoder,
            "fp16 loses small gradients, which nothing scales there: use bf16": (
                self.accelerator.mixed_precision == "fp16"
            ),
        }

    def _submodel(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack) -> PreTrainedModel:
        """The submodel of a stage whose groups are known, without adapter, healed where that is asked for."""
        submodel = build_submodel(base, stack, stage.groups, stage.fusion, stage.fusion_beta)
        if self.args.healing_steps and stage.num_layers < stage.full_layers:
            self._heal(stage, base, stack, submodel)
        return submodel

    def _heal(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack, submodel: PreTrainedModel) -> None:
        """Teach `submodel`'s layers to stand for the whole base; what this run has taught before is read again."""
        layers, kept, flops = layers_of(submodel, stack, stage.groups), self._kept(stage), 0.0
        if self.is_world_process_zero():
            if kept.exists():
                load_healed_state(layers, read_healed(kept))
            else:
                flops = self._teach_layers(stage, base, submodel, layers)
                save_healed(kept, healed_state(layers))
        if self.args.world_size > 1:
            # Machines may differ in their last bits: the main process's layers are everyone's.
            state = healed_state(layers)
            state = {name: tensor.to(self.args.device, copy=True) for name, tensor in state.items()}
            load_healed_state(layers, broadcast(state))
        self._spend(stage, broadcast_object_list([flops])[0])
        self._seed_round()

    def _teach_layers(
        self, stage: StageConfig, base: PreTrainedModel, submodel: PreTrainedModel, layers: list[nn.Module]
    ) -> float:
        """Returns the FLOPs."""
        args, flops = self.args, 0.0
        set_seed(args.seed + stage.stage)  # collators and dropout may draw
        teacher = build_whole(base, args.stack).to(args.device).requires_grad_(False)
        if self._base_answers is None:
            self._base_answers, flops = self._answered(teacher)
        batches = self._batches(self._base_answers, args.healing_steps, args.seed + stage.stage)
        positions = heal(
            teacher,
            submodel.to(args.device),
            layers,
            map(self._without_labels, batches),
            args.healing_steps,
            args.healing_learning_rate,
            functools.partial(self._half_precision, base.dtype == torch.bfloat16),
        )
        return flops + positions * (forward_flops(teacher) + 3 * forward_flops(submodel))

    def _half_precision(self, is_half: bool) -> AbstractContextManager:
        """That of training, or of weights that are in bfloat16 already."""
        return torch.autocast(self.args.device.type, torch.bfloat16) if is_half else self._autocast()

    def _kept(self, stage: StageConfig) -> Path:
        """Where this run keeps a stage's healed layers."""
        return healed_path(Path(self.args.output_dir, _KEPT), stage.stage)

    def _needed_later(self, stage: StageConfig) -> list[StageConfig]:
        """The stages whose healed layers a run needs to go on within `stage` or after it: its own, and those that
        clients train who can hold no more."""
        if not self.args.healing_steps:
            return []
        first = 1 if self.args.client_max_layers else stage.stage
        return [each for each in self.stages[first - 1 : stage.stage] if each.num_layers < each.full_layers]

    def _keep_healed(self, stage: StageConfig, folder: Path) -> None:
        """What goes with a compact adapter of `stage` into its folder."""
        for each in self._needed_later(stage):
            link_or_copy(self._kept(each), healed_path(folder, each.stage))

    def _take_up_healed(self, folder: str, checkpoint: Checkpoint) -> None:
        """Make what a resumed run has healed this one's.

        Raises:
            ValueError: a stage's layers are needed and not there.
        """
        within = checkpoint.sub is not None
        if not within and not (self.args.distillation_steps or self.args.client_max_layers):
            return
        for stage in self._needed_later(self.stages[checkpoint.run.stage - 1 - (not within)]):
            places = (Path(folder, SUBMODEL), Path(folder, f"stage-{stage.stage}", SUBMODEL))
            paths = [path for place in places if (path := healed_path(place, stage.stage)).exists()]
            if not paths:
                raise ValueError(
                    f"{folder} lacks the healed layers of stage {stage.stage}, "
                    f"{healed_path(SUBMODEL, stage.stage)}: give the whole folder, as the run has left it."
                )
            if self.is_world_process_zero():
                link_or_copy(paths[0], self._kept(stage))

    def _forget_healed(self) -> None:
        """What another run has left."""
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir, _KEPT), ignore_errors=True)

    def _spend(self, stage: StageConfig, flops: float) -> None:
        """Note what teaching took of the server."""
        stage.totals["setup_flops"] = stage.totals.get("setup_flops", 0.0) + flops

    def _distil(self, stage: StageConfig, base: PreTrainedModel, stack: LayerStack, student: PeftModel) -> None:
        """Teach `student`, the submodel of `stage`, what that of the stage before answers."""
        teacher = self._submodel_of(self.stages[stage.stage - 2], base, stack)
        self._seed_round()  # collators and dropout may draw
        flops, taught = 0.0, None
        if self.is_world_process_zero():
            teacher = teacher.to(self.args.device).requires_grad_(False)
            rows, flops = self._answered(teacher)
            batches = self._batches(rows, self.args.distillation_steps, self.args.seed + stage.stage)
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
        self._spend(stage, flops)
        self._seed_round()

    def _without_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}

    def _answered(self, teacher: PreTrainedModel | PeftModel) -> tuple[Dataset, float]:
        """(the server's rows, FLOPs); answers to prompts are the teacher's own."""
        args, rows = self.args, self._calibration_rows()
        if args.task not in ANSWERING:
            return rows, 0.0
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
        texts = [told.get(index, whole) for index, (_, whole) in enumerate(pairs)]
        labels = [[IGNORED] * len(text) for text in texts]
        flops = sum(map(len, told.values())) * forward_flops(teacher)
        return Dataset.from_dict({"input_ids": texts, "labels": labels}), flops

    def _batches(self, rows: Dataset, steps: int, seed: int) -> DataLoader:
        """As many batches as `steps`."""
        count = steps * self.args.train_batch_size
        sampler = RandomSampler(rows, num_samples=count, generator=torch.Generator().manual_seed(seed))
        rows = self._remove_unused_columns(rows, description="The server's texts")
        return DataLoader(rows, batch_size=self.args.train_batch_size, sampler=sampler, collate_fn=self.data_collator)
