"""What the server teaches on its own texts: a submodel, to stand for the whole base (bridges, healing); a larger
submodel, what the smaller one before it answers (distillation)."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import RandomSampler, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.files import write_tensors
from hf_devft.models.adapter import adapter_state, load_adapter_state
from hf_devft.models.flops import flops_per_token, forward_flops
from hf_devft.models.layer_files import read_healed
from hf_devft.run.healed_layers import HealedLayers
from hf_devft.stages.bridges import BRIDGE
from hf_devft.stages.builder import SubmodelBuilder
from hf_devft.stages.teaching.bridging import bridge_errors, bridge_errors_flops, fit_bridges, fit_flops
from hf_devft.stages.teaching.distillation import distil
from hf_devft.stages.teaching.healing import heal, load_taught_state, taught_state
from hf_devft.tasks import answers_prompts
from hf_devft.tasks.data import IGNORED
from hf_devft.tasks.generation import continuations, prompt_and_answer


Inputs = dict[str, Any]
# (rows, rows of a batch, which rows in which order; default: as they are) -> what a model reads of them.
BatchesOf = Callable[[Dataset, int, Sampler | None], Iterable[Inputs]]


class ServerTeacher:
    """Bridges, heals and distils on the server's own texts, of which no label is used. The main process does it, and
    what it has made is everyone's, as machines may differ in their last bits.

    A federated precedent is FedDF (Lin et al. 2020, arXiv 2006.07242), which distils many clients' models into one.

    Args:
        args: the run's.
        rows: the server's texts, encoded; None where nothing is taught.
        processor: the tokenizer, where answers are generated.
        batches_of: makes batches of rows, on the device.
        autocast: () -> the context of a forward pass in training.
        healed: where healed layers are kept.
    """

    def __init__(
        self,
        args: DevFTConfig,
        rows: Dataset | None,
        processor: PreTrainedTokenizerBase | None,
        batches_of: BatchesOf,
        autocast: Callable[[], AbstractContextManager],
        healed: HealedLayers,
    ):
        self.args, self.rows, self.processor = args, rows, processor
        self.batches_of, self.autocast, self.healed = batches_of, autocast, healed
        self._base_answers: Dataset | None = None  # to the server's prompts; the base does not change
        self._bridge_errors: torch.Tensor | None = None  # of its layers

    def bridge_errors(self, builder: SubmodelBuilder) -> tuple[torch.Tensor, float]:
        """Estimate how badly bridges would stand for each block of layers; see `bridging.bridge_errors`. Returns that,
        and the FLOPs that it took."""
        if self._bridge_errors is not None:
            return self._bridge_errors, 0.0
        flops = 0.0
        if self.args.process_index == 0:
            teacher = self._whole(builder)
            layers = builder.stack.names.layers(teacher)
            self._bridge_errors = bridge_errors(teacher, layers, self._texts(), self._precision_of(builder))
            flops = self._reading_flops(teacher) + bridge_errors_flops(teacher, len(layers), self._num_positions())
        self._bridge_errors, flops = broadcast_object_list([self._bridge_errors, flops])
        return self._bridge_errors, flops

    def stand_for_base(
        self, record: StageConfig, builder: SubmodelBuilder, submodel: PreTrainedModel, layers: list[nn.Module]
    ) -> float:
        """Make a stage's submodel stand for the whole base, by bridges or healing or both, as its record says; what
        this run has made before is read again.

        Args:
            submodel: without adapter; its `layers` get new weights, in place.

        Returns:
            The FLOPs that it took.
        """
        path, flops, bridges_only = self.healed.path(record.stage), 0.0, not record.healing_steps
        if self.args.process_index == 0:
            if path.exists():
                load_taught_state(layers, read_healed(path), bridges_only)
            else:
                teacher = self._whole(builder)
                if record.has_bridges:
                    flops += self._bridge(record, builder, teacher, layers)
                if record.healing_steps:
                    flops += self._heal(record.stage, builder, teacher, submodel, layers)
                write_tensors(path, taught_state(layers, bridges_only))
        if self.args.world_size > 1:
            made = taught_state(layers, bridges_only)
            state = {name: tensor.to(self.args.device, copy=True) for name, tensor in made.items()}
            load_taught_state(layers, broadcast(state), bridges_only)
        return broadcast_object_list([flops])[0]

    def _bridge(
        self, record: StageConfig, builder: SubmodelBuilder, teacher: PreTrainedModel, layers: list[nn.Module]
    ) -> float:
        bridges = {
            (group[0], group[-1]): layer.get_submodule(BRIDGE)
            for group, layer in zip(record.groups or [], layers, strict=True)
            if len(group) > 1
        }
        whole = builder.stack.names.layers(teacher)
        fit_bridges(teacher, whole, bridges, self._texts(), self._precision_of(builder))
        return self._reading_flops(teacher) + fit_flops(teacher, len(bridges), self._num_positions())

    def _whole(self, builder: SubmodelBuilder) -> PreTrainedModel:
        """The whole base, as a teacher."""
        return builder.whole().to(self.args.device).requires_grad_(False)

    def _texts(self) -> Iterable[Inputs]:
        """The server's texts in batches, without labels."""
        set_seed(self.args.seed)  # collators may draw
        assert self.rows is not None
        return map(_without_labels, self.batches_of(self.rows, self.args.eval_batch_size, None))

    def _num_positions(self) -> int:
        """In the server's texts, without padding."""
        assert self.rows is not None
        return sum(map(len, self.rows["input_ids"])) if "input_ids" in self.rows.column_names else len(self.rows)

    def _reading_flops(self, teacher: PreTrainedModel) -> float:
        return self._num_positions() * forward_flops(teacher)

    def _precision_of(self, builder: SubmodelBuilder) -> Callable[[], AbstractContextManager]:
        return functools.partial(self._half_precision, builder.base.dtype == torch.bfloat16)

    def _heal(
        self,
        stage: int,
        builder: SubmodelBuilder,
        teacher: PreTrainedModel,
        submodel: PreTrainedModel,
        layers: list[nn.Module],
    ) -> float:
        args, flops = self.args, 0.0
        set_seed(args.seed + stage)  # collators and dropout may draw
        if self._base_answers is None:
            self._base_answers, flops = self._answered(teacher)
        positions = heal(
            teacher,
            submodel.to(args.device),
            layers,
            self._batches(self._base_answers, args.healing_steps, args.seed + stage, "healing"),
            args.healing_steps,
            args.healing_learning_rate,
            self._precision_of(builder),
        )
        return flops + positions * (forward_flops(teacher) + 3 * forward_flops(submodel))

    def distil(self, record: StageConfig, smaller: PeftModel, student: PeftModel) -> float:
        """Teach `student`, a stage's submodel, what `smaller`, that of the stage before, answers; changes the
        student's adapter, in place.

        Returns:
            The FLOPs that it took.
        """
        flops, taught = 0.0, None
        if self.args.process_index == 0:
            teacher = smaller.to(self.args.device).requires_grad_(False)
            rows, flops = self._answered(teacher)
            positions = distil(
                teacher,
                student.to(self.args.device),
                self._batches(rows, self.args.distillation_steps, self.args.seed + record.stage, "distilling"),
                self.args.distillation_steps,
                self.args.learning_rate,
                self.autocast,
            )
            flops += positions * (forward_flops(teacher) + sum(flops_per_token(student)))
            taught = adapter_state(student)
        taught, flops = broadcast_object_list([taught, flops])
        load_adapter_state(student, taught)
        return flops

    def _half_precision(self, is_half: bool) -> AbstractContextManager:
        """The precision of training, or that of weights that are in bfloat16 already."""
        return torch.autocast(self.args.device.type, torch.bfloat16) if is_half else self.autocast()

    def _batches(self, rows: Dataset, steps: int, seed: int, what: str) -> Iterable[Inputs]:
        """Draw as many batches as `steps`, without labels, under a bar that says what they are for."""
        size = self.args.train_batch_size
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(rows, num_samples=steps * size, generator=generator)
        batches = map(_without_labels, self.batches_of(rows, size, sampler))
        return tqdm(batches, desc=what, total=steps, leave=False, disable=self.args.disable_tqdm)

    def _answered(self, teacher: PreTrainedModel | PeftModel) -> tuple[Dataset, float]:
        """Let the teacher answer the server's prompts; returns the rows with its answers, and the FLOPs."""
        args, rows = self.args, self.rows
        if not answers_prompts(args.task):
            return rows, 0.0
        pairs = list(map(prompt_and_answer, rows.with_format(None)))
        room = args.max_length - args.generation_max_new_tokens
        asked = {index: prompt[-room:] for index, (prompt, _) in enumerate(pairs) if prompt}
        with self.autocast():
            answers = continuations(
                teacher,
                self.processor,
                list(asked.values()),
                args.generation_max_new_tokens,
                args.eval_batch_size,
            )
        told = {index: prompt + answers[place] for place, (index, prompt) in enumerate(asked.items())}
        texts = [told.get(index, whole) for index, (_, whole) in enumerate(pairs)]
        labels = [[IGNORED] * len(text) for text in texts]
        flops = sum(map(len, told.values())) * forward_flops(teacher)
        return Dataset.from_dict({"input_ids": texts, "labels": labels}), flops


def _without_labels(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "labels"}
