"""`DevFTConfig`: what the user says of a run."""

import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.training_args import OptimizerNames

from hf_devft.configuration.compatibility import check_compatibility
from hf_devft.configuration.facts import Setup
from hf_devft.configuration.output_options import OutputOptions
from hf_devft.configuration.privacy_options import PrivacyOptions, settle_privacy
from hf_devft.configuration.stage_config import StageConfig, adapted_layers, derive_layers, plan_stages
from hf_devft.federation.heterogeneity.capacity import BEYOND_CAPACITY
from hf_devft.federation.methods import (
    AGGREGATION_RULES,
    CORRECTIONS,
    METHODS,
    SERVER_OPTIMIZERS,
    make_methods,
)
from hf_devft.federation.partition import DEFAULT_NUM_CLIENTS, PARTITIONS
from hf_devft.federation.privacy import LEVELS, SAMPLINGS
from hf_devft.federation.sampling import PLACEMENTS
from hf_devft.federation.selection import SELECTIONS
from hf_devft.federation.wire import WIRE_DTYPES
from hf_devft.models.layer_stack import STACKS
from hf_devft.stages.fusion import FUSIONS
from hf_devft.stages.grouping import GROUPINGS
from hf_devft.stages.transfer import TRANSFERS
from hf_devft.tasks import TASKS


# Options of `TrainingArguments` that have no meaning here: (the value that says nothing, what to use instead).
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "num_train_epochs": (3.0, "an epoch is a stage here: set `stage_layers` and `stage_rounds`"),
    "fsdp": (None, "shard with DeepSpeed ZeRO-3 instead (recipes/accelerate/zero3.yaml)"),
    "parallelism_config": (None, "tensor, context and sequence parallelism are not implemented"),
    "neftune_noise_alpha": (None, "noise on the embeddings is not implemented"),
    "use_liger_kernel": (False, "Liger kernels are not implemented"),
    "debug": ([], "use `torch.autograd.set_detect_anomaly`"),
    "bf16_full_eval": (False, "a base would be in two precisions: set `bf16`"),
    "fp16_full_eval": (False, "a base would be in two precisions: set `fp16`"),
    "enable_jit_checkpoint": (False, "`devft train` saves when it is told to stop; set `save_steps`"),
    "ignore_data_skip": (False, "a resumed run draws just the batches that are still to come"),
    "dataloader_persistent_workers": (False, "one data loader serves a whole run anyway"),
}
# Optimisers that keep the parameters in a state of their own between steps, or step within the backward pass.
_UNSUPPORTED_OPTIMIZERS = ("schedule_free", "lomo", "adalomo", "layerwise")
# Options of an earlier version: {old name: new name}.
RENAMED = {"wire_top_k": "upload_fraction"}
# Where the layers of `adapter_layers` are.
ENDS = ("first", "last")
_RULES = ("grouping", "fusion", "fusion_beta", "transfer", "stack", "federated_method")  # the same in all stages
_OPEN = ("task", "stack", "adapter_fusion")  # None is a choice, too
# Option -> what it may name. The registries are the only lists: a rule that is registered there is a choice here.
CHOICES: dict[str, Collection[str]] = {
    "grouping": GROUPINGS,
    "fusion": FUSIONS,
    "adapter_fusion": FUSIONS,
    "transfer": TRANSFERS,
    "task": TASKS,
    "stack": STACKS,
    "partition": PARTITIONS,
    "beyond_capacity": BEYOND_CAPACITY,
    "client_selection": SELECTIONS,
    "client_placement": PLACEMENTS,
    "wire_dtype": WIRE_DTYPES,
    "dp_level": LEVELS,
    "dp_sampling": SAMPLINGS,
    "adapter_layers_from": ENDS,
    # Of `Trainer`'s: a client shuffles its own rows, those of a round by length where it is asked to.
    "train_sampling_strategy": ("random", "group_by_length"),
}
# Option -> the least value that it may have.
_MINIMA = {
    "initial_layers": 1, "calibration_samples": 1, "num_clients": 1, "clients_per_round": 1, "local_steps": 1,
    "clients_per_batch": 1, "max_length": 2, "max_eval_samples": 1, "generation_max_new_tokens": 1,
    "dataset_num_proc": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "round_quorum": 1, "round_retries": 0, "distillation_steps": 0,
    "healing_steps": 0,
}  # fmt: skip
# (options, whether a value is allowed, what to give instead).
_RANGES = (
    (("client_dropout_rate",), lambda value: 0 <= value < 1, "a probability from 0 to below 1"),
    (("client_eval_size",), lambda value: 0 < value < 1, "a part above 0, below 1"),
    (("upload_fraction",), lambda value: 0 < value <= 1, "a part above 0, up to 1"),
    (("growth_factor",), lambda value: value > 1, "a factor above 1, which grows"),
    (("learning_rate", "healing_learning_rate"), lambda value: value > 0, "a rate above 0"),
    (("dirichlet_alpha",), lambda value: value > 0, "a concentration above 0"),
    (("dp_noise_multiplier", "dp_target_epsilon"), lambda value: value > 0, "a number above 0"),
    (("dp_delta",), lambda value: 0 < value < 1, "a probability above 0, below 1"),
    (("client_max_layers",), lambda value: value and min(value) >= 1, "numbers of layers, 1 or more each"),
)


def _names(choices: Collection[str]) -> str:
    return ", ".join(choices)


_MAPPINGS = ("model_init_kwargs", "federated_method_kwargs", "client_selection_kwargs")


@dataclass
class DevFTConfig(PrivacyOptions, OutputOptions, TrainingArguments):
    """
    Arguments of a developmental federated run: those of [`~transformers.TrainingArguments`], of [`PrivacyOptions`],
    of [`OutputOptions`] and the following.

    The Trainer's *step* is a communication round and its *epoch* a stage, so `logging_steps`, `eval_steps`,
    `save_steps`, `max_steps`, `warmup_steps` and `lr_scheduler_type` count or act on rounds, and the `"epoch"`
    strategies act at the ends of stages. `learning_rate`, the batch size, accumulation, clipping and the
    optimiser are those of local training.

    > Parameters that control the stages

        stage_layers (`list[int]`, *optional*):
            Layers of each stage's submodel, increasing, to the model's depth L. Default: by the next two.
        initial_layers (`int`, *optional*, defaults to `4`):
            Layers of the first stage where `stage_layers` is not given (the paper starts at 4).
        growth_factor (`float`, *optional*, defaults to `2.0`):
            Growth from stage to stage where `stage_layers` is not given, ending at L (paper: doubling).
        stage_rounds (`int` or `list[int]`, *optional*, defaults to `75`):
            Rounds of each stage: one value, or one per stage.
        stage_learning_rates (`float` or `list[float]`, *optional*, defaults to `learning_rate`):
            Learning rate of each stage before the schedule: one value, or one per stage.
        adapter_layers (`list[int]`, *optional*):
            Other stages than of submodels (ours): in each one all layers compute, but only so many of them have an
            adapter, increasing, in the last one all. What was learned stays as it is where the others get theirs. With
            `stage_layers` left out.
        adapter_layers_from (`str`, *optional*, defaults to `"last"`):
            Which layers these are: the `"last"`, so that no gradient goes through those below and nothing of them is
            kept in memory, or the `"first"`.

    > Parameters that control the rules of a stage

        grouping (`str`, *optional*, defaults to `"deconfliction"`):
            Which layers share a group: `"deconfliction"` (paper), `"normalized_cut"` (the same with balanced groups),
            `"even"`, `"random"`, `"calibrated"`, `"prefix"`, the first layers, as ProgFed grows (with `fusion` and
            `transfer` `"anchor"`), or `"bridged"` (ours, with `fusion="bridge"`), which leaves out those blocks of
            layers that bridges stand for best.
        calibration_samples (`int`, *optional*, defaults to `32`):
            Texts of the server's, from `calibration_dataset`, that `"calibrated"` grouping measures the loss on (else
            from `eval_dataset`), that bridges are fitted on, and that `healing_steps` and `distillation_steps` ask.
        fusion (`str`, *optional*, defaults to `"anchor"`):
            A group's representative: `"differential"` (paper), `"mean"`, `"sum"`, or `"anchor"`, its first layer as it
            is (our choice: with `"broadcast"` the best of benchmarks/results/quickstart.md and
            ablations.md, by little). `"bridge"` (ours, for bases that were not grown) is that with a bridge behind it
            for the layers that follow, h + W rmsnorm(h) + b, found by regression on the texts in
            `calibration_dataset`, without labels: the layers that stay read nearly what they have always read.
        fusion_beta (`float`, *optional*, defaults to `0.1`):
            β of differential fusion (paper: 0.1; 0.15 for LLaMA2-13B).
        stack (`str`, *optional*):
            Which layers of an encoder-decoder model the stages shorten, `"encoder"` or `"decoder"`. By default both,
            whose layers are counted together in `stage_layers`.
        transfer (`str`, *optional*, defaults to `"broadcast"`):
            Who in a group receives its adapter: `"broadcast"` (paper), `"anchor"`, `"split"`.
        adapter_fusion (`str`, *optional*, defaults to `fusion`):
            How a stage's adapter starts from those of a group's members; the names of `fusion`.
        healing_steps (`int`, *optional*, defaults to `0`):
            Steps in which the server teaches the layers of each submodel, all their weights, to predict, on the texts
            in `calibration_dataset`, the next tokens as the whole base does (ours: layers that are cut out of a base
            that was not grown cannot stand for it). No label is used: the answers to prompts are the base's. A batch
            is `per_device_train_batch_size`. The healed layers are part of the stage, in its `submodel/`. The main
            process does it, as with `distillation_steps`.
        healing_learning_rate (`float`, *optional*, defaults to `1e-4`):
            The rate of that, falling to 0 (our choice: one for whole weights; small models take more).
        distillation_steps (`int`, *optional*, defaults to `0`):
            Steps in which the server teaches each larger submodel, before its first round, to answer as the smaller
            one does (ours: where layers come back, much of what was learned is lost). Of the texts in
            `calibration_dataset` no label is used: the answers to prompts are the smaller submodel's. A batch is
            `per_device_train_batch_size`, the rate falls from `learning_rate` to 0. The main process does it: where it
            takes longer than `ddp_timeout`, raise that.
        temporary_head (`bool`, *optional*, defaults to `False`):
            Whether all stages but the last also train an adapter on the output embeddings, which is dropped at the
            stage's end, as ProgFed's temporary heads are.

    > Parameters that control the federation

        num_clients (`int`, *optional*):
            Clients that the dataset is partitioned over; by default 20 (paper), or as many as a natural or given
            partition has.
        clients_per_round (`int`, *optional*, defaults to `2`):
            Clients sampled for a round (paper: 2).
        local_steps (`int`, *optional*, defaults to `10`):
            Optimiser steps of a client in a round (paper: 10).
        clients_per_batch (`int`, *optional*):
            How many of a round's clients a process trains in one forward and backward pass, with the same result but
            for rounding. By default all of them on an accelerator and 1 on a CPU; where a model or an option cannot,
            they are trained one after another (a warning says why, where a number was given).
        auto_activation_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to compute a stage's layers again in the backward pass, as `activation_checkpointing` does, only
            where a client's training is planned to take more than nine tenths of the memory that its device has free.
            The result is the same. Of models that read tokens.
        partition (`str`, *optional*, defaults to `"iid"`):
            How one dataset is cut into clients: `"iid"`, `"dirichlet"` over `partition_column`, or `"natural"`, one
            client for each value of `partition_column`.
        partition_column (`str`, *optional*):
            Column for `"dirichlet"` and `"natural"`; `"iid"` needs none.
        dirichlet_alpha (`float`, *optional*, defaults to `0.5`):
            Concentration: the smaller, the more the clients differ.
        federated_method (`str`, *optional*, defaults to `"fedit"`):
            What travels and how it is combined: `"fedit"`, `"ffa_lora"`, `"fedsa_lora"`, `"rolora"`, `"flora"`,
            `"fedex_lora"`, `"flexlora"`, `"hlora"`, `"hetlora"`, `"c2a"`, `"dofit"`, `"droppeft"`, or a registered
            one. A correction of local training (`"fedprox"`, `"scaffold"`) and a server optimiser (`"fedavgm"`,
            `"fedadagrad"`, `"fedadam"`, `"fedyogi"`) can be joined: `"ffa_lora+fedprox+fedadam"`; and in place of the
            mean a robust rule (`"median"`, `"trimmed_mean"`, `"geometric_median"`, `"krum"`, `"multi_krum"`,
            `"norm_clipping"`): `"fedit+multi_krum"`.
        federated_method_kwargs (`dict` or `str`, *optional*):
            Options of what `federated_method` names, such as `{"mu": 0.1}`; see docs/methods.md.
        wire_dtype (`str`, *optional*, defaults to `"fp32"`):
            Encoding of what travels: `"fp32"`, `"bf16"`, blockwise `"int8"` or `"int4"`; upwards with error feedback.
        upload_fraction (`float`, *optional*, defaults to `1.0`):
            Part of the values that a client sends, the largest changes, with error feedback.
        wire_top_k (`float`, *optional*):
            The earlier name of `upload_fraction`; goes with version 0.3.
        client_selection (`str`, *optional*, defaults to `"uniform"`):
            Which clients a round asks: `"uniform"`, `"by_size"` (chances in proportion to their examples, and updates
            count alike) or `"resource_aware"` (REFL: those first that will soon be gone; updates may come late).
        client_selection_kwargs (`dict` or `str`, *optional*):
            Options of the selection, such as `{"wait_for": 0.8}`.
        client_resources (`str`, *optional*):
            Speeds, bandwidths and times of the clients, for a simulated clock in the ledger: a JSON file (see
            docs/methods.md), or `"simulated"` for made-up ones (the default of `"resource_aware"`).
        client_max_layers (`list[int]`, *optional*):
            Most layers that each client can train; a shorter list is repeated (`[16, 8]`: every other client has 8).
        beyond_capacity (`str`, *optional*, defaults to `"sit_out"`):
            What a client does in stages of more layers: `"sit_out"`, or `"keep_last"`, train the last stage's submodel
            that it can hold, from and for the running stage's adapter.
        client_dropout_rate (`float`, *optional*, defaults to `0.0`):
            Probability that a sampled client receives the adapter but is not heard of again (a simulation).
        round_quorum (`int`, *optional*, defaults to `1`):
            How many clients of a round must return a finite adapter. The others are left out.
        round_retries (`int`, *optional*, defaults to `3`):
            How often a round below its quorum is tried again, with others; not in a private run, nor a secure sum.
        client_placement (`str`, *optional*):
            How work is placed on processes: `"client_parallel"`, each process trains its share of the round's clients
            (the default), or `"data_parallel"`, all processes train each client together, each on its share of every
            batch (the default under DeepSpeed, and all that it can do). The result is the same on any number of
            processes, so `per_device_train_batch_size` is a client's batch wherever it is trained.

    > Parameters that control the model and the evaluation

        task (`str`, *optional*):
            What the model is for, by the name of transformers' pipeline: `"text-generation"`,
            `"text2text-generation"`, `"text-classification"`, `"token-classification"`, `"image-classification"`,
            `"audio-classification"` or `"automatic-speech-recognition"`. By default what the adapter's `task_type` or
            the model's class says; for `devft train` text generation.
        dataset_num_proc (`int`, *optional*):
            Processes that encode the rows.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` where the model is given by name.
        max_length (`int`, *optional*, defaults to `512`):
            Tokens that a prompt with its completion is cut to (paper: 512).
        client_eval_size (`float`, *optional*):
            Part of each client's rows that is held out, and evaluated on client by client; the mean over the clients
            and the worst of them are reported, too.
        max_eval_samples (`int`, *optional*):
            Evaluate on the first so many rows only (of each evaluation set).
        predict_with_generate (`bool`, *optional*, defaults to `False`):
            Also measure exact match by greedy generation, at full depth, at the end of each stage.
        generation_max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest generated answer.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_MAPPINGS]

    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of local training."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many rounds."})
    save_steps: float = field(default=10, metadata={"help": "Checkpoint every so many rounds."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Integrations to report to."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule over all rounds."})

    stage_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers of each stage, increasing, ending at the model's depth."}
    )
    initial_layers: int = field(default=4, metadata={"help": "Layers of the first stage, without stage_layers."})
    growth_factor: float = field(default=2.0, metadata={"help": "Growth per stage, without stage_layers."})
    stage_rounds: list[int] = field(
        default_factory=lambda: [75], metadata={"help": "Rounds of each stage: one value, or one per stage."}
    )
    stage_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rate of each stage: one value, or one per stage."}
    )
    adapter_layers: list[int] | None = field(
        default=None, metadata={"help": "Instead of submodels: layers with an adapter in each stage."}
    )
    adapter_layers_from: str = field(
        default="last", metadata={"help": f"Which layers adapter_layers counts: {_names(ENDS)}."}
    )
    grouping: str = field(
        default="deconfliction", metadata={"help": f"Which layers share a group: {_names(GROUPINGS)}."}
    )
    calibration_samples: int = field(
        default=32, metadata={"help": "The server's texts, for grouping, bridges, healing and distillation."}
    )
    fusion: str = field(default="anchor", metadata={"help": f"A group's representative: {_names(FUSIONS)}."})
    fusion_beta: float = field(default=0.1, metadata={"help": "Beta of differential fusion."})
    stack: str | None = field(
        default=None,
        metadata={"help": f"The stack of an encoder-decoder model to shorten: {_names(STACKS)}. Default: both."},
    )
    transfer: str = field(
        default="broadcast", metadata={"help": f"Who receives a group's adapter: {_names(TRANSFERS)}."}
    )
    adapter_fusion: str | None = field(
        default=None, metadata={"help": "How a stage's adapter starts; the names of fusion. Default: fusion."}
    )
    healing_steps: int = field(
        default=0, metadata={"help": "Steps on the server that teach a submodel's layers to stand for all."}
    )
    healing_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of healing_steps."})
    distillation_steps: int = field(
        default=0, metadata={"help": "Steps on the server that teach a larger submodel what the smaller one answers."}
    )
    temporary_head: bool = field(
        default=False, metadata={"help": "Adapt the output embeddings, too, until the last stage."}
    )
    num_clients: int | None = field(default=None, metadata={"help": "Clients; default 20, or as the data says."})
    clients_per_round: int = field(default=2, metadata={"help": "Clients sampled for a round."})
    local_steps: int = field(default=10, metadata={"help": "Optimiser steps of a client in a round."})
    clients_per_batch: int | None = field(
        default=None, metadata={"help": "Clients trained in one batch. Default: all on an accelerator, 1 on a CPU."}
    )
    auto_activation_checkpointing: bool = field(
        default=False, metadata={"help": "Activation checkpointing in stages that would not fit into memory without."}
    )
    partition: str = field(
        default="iid", metadata={"help": f"How a dataset is cut into clients: {_names(PARTITIONS)}."}
    )
    partition_column: str | None = field(default=None, metadata={"help": "Column for dirichlet and natural."})
    dirichlet_alpha: float = field(default=0.5, metadata={"help": "Concentration of the Dirichlet partition."})
    federated_method: str = field(
        default="fedit",
        metadata={
            "help": f"One of {_names(METHODS)}; joined by + with one of {_names(CORRECTIONS)} and of "
            f"{_names(SERVER_OPTIMIZERS)} and of {_names(AGGREGATION_RULES)}."
        },
    )
    federated_method_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the federated method, as JSON."}
    )
    wire_dtype: str = field(default="fp32", metadata={"help": f"Encoding of what travels: {_names(WIRE_DTYPES)}."})
    upload_fraction: float = field(default=1.0, metadata={"help": "Part of the values that a client sends."})
    wire_top_k: float | None = field(default=None, metadata={"help": "The earlier name of upload_fraction."})
    client_selection: str = field(default="uniform", metadata={"help": f"Who takes part: {_names(SELECTIONS)}."})
    client_selection_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the selection, as JSON."}
    )
    client_resources: str | None = field(
        default=None, metadata={"help": "JSON file of the clients' speeds and times, or 'simulated'."}
    )
    client_max_layers: list[int] | None = field(
        default=None, metadata={"help": "Most layers that a client can train, for the clients in turns."}
    )
    beyond_capacity: str = field(
        default="sit_out",
        metadata={"help": f"What clients do in stages that they cannot hold: {_names(BEYOND_CAPACITY)}."},
    )
    client_dropout_rate: float = field(default=0.0, metadata={"help": "Probability that a client drops out."})
    round_quorum: int = field(default=1, metadata={"help": "Clients that must return a finite adapter."})
    round_retries: int = field(default=3, metadata={"help": "Retries of a round below its quorum."})
    client_placement: str | None = field(
        default=None,
        metadata={"help": f"Placement of work on processes: {_names(PLACEMENTS)}. Default: as the launch says."},
    )
    task: str | None = field(default=None, metadata={"help": f"What the model is for: {_names(TASKS)}."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that encode the rows."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, as JSON."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens that a prompt with its completion is cut to."})
    client_eval_size: float | None = field(
        default=None, metadata={"help": "Part of each client's rows to evaluate on, client by client."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Measure exact match by generation at each stage's end."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer, in tokens."})

    def __post_init__(self):
        for option in _MAPPINGS:
            value = getattr(self, option)
            as_mapping(option, value)
            if isinstance(value, str):
                setattr(self, option, value.strip())  # transformers reads what begins with a brace
        if self.deepspeed and not is_deepspeed_available():
            raise ImportError(
                "DeepSpeed is not installed: pip install 'hf-devft[deepspeed]', in a clone '.[deepspeed]'"
            )
        # Without that, bf16 is refused, and of several processes each would take itself for the only one.
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()
        _rename_options(self)
        settle_privacy(self)
        self._n_gpu = min(self.n_gpu, 1)  # one process, one device: clients are not spread by DataParallel
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns of it on every data loader
        if self.client_placement is None:
            self.client_placement = "data_parallel" if self.deepspeed_plugin is not None else "client_parallel"
        # A client's tokens count against each other, on however many processes it is; never against another client's.
        self.average_tokens_across_devices = self.client_placement == "data_parallel"
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # an adapter is on all layers, and torch warns of the search
        _check_values(self)
        check_compatibility(Setup(self))
        for option in ("stage_layers", "adapter_layers"):
            if (layers := getattr(self, option)) is not None:
                setattr(self, option, list(layers))
                self.resolve_stages(layers[-1] if layers else 0)

    @property
    def fuses_adapters_by(self) -> str:
        """`adapter_fusion`, or else `fusion`."""
        return self.adapter_fusion or self.fusion

    @property
    def asks_server_texts(self) -> bool:
        """Whether grouping or teaching needs texts of the server's own."""
        bridges = self.fusion == "bridge" or self.grouping == "bridged"
        return bool(bridges or self.grouping == "calibrated" or self.healing_steps or self.distillation_steps)

    def resolve_stages(self, num_layers: int) -> list[StageConfig]:
        """Make the records of a run's stages on a model of `num_layers` layers.

        Raises:
            ValueError: numbers of layers that do not increase from at least 1 to exactly `num_layers`, a list of
                rounds or learning rates that is neither one value nor one per stage, or fewer rounds than `max_steps`.
        """
        derived = derive_layers(num_layers, self.initial_layers, self.growth_factor)
        option = "adapter_layers" if self.adapter_layers else "stage_layers"
        given = getattr(self, option)
        layers = list(derived if given is None else given)
        if not layers or any(a >= b for a, b in pairwise([0, *layers])):
            raise ValueError(f"{option}={layers} must increase, from 1 or more, as in 4 8 16.")
        if layers[-1] != num_layers:
            raise ValueError(f"{option}={layers} must end at the model's {num_layers} layers, such as {derived}.")
        adapted: list[list[int] | None] = [None] * len(layers)
        if self.adapter_layers:
            adapted = adapted_layers(layers, self.adapter_layers_from)
            layers = [num_layers] * len(layers)
        stages = plan_stages(
            layers,
            self.stage_rounds,
            self.stage_learning_rates or self.learning_rate,
            self.healing_steps,
            adapted,
            task=self.task or "text-generation",
            adapter_fusion=self.fuses_adapters_by,
            **{name: getattr(self, name) for name in _RULES},
        )
        _check_max_steps(self.max_steps, stages)
        return stages


def _check_max_steps(max_steps: int, stages: list[StageConfig]) -> None:
    """Refuse to promise more rounds than stages have."""
    if max_steps > (rounds := sum(stage.rounds for stage in stages)):
        raise ValueError(
            f"max_steps={max_steps}, but stages have {rounds} rounds in all: raise stage_rounds, or leave it out."
        )


def _rename_options(args: DevFTConfig) -> None:
    """Move what is given by an option's earlier name to the new one, in place, with a warning."""
    for old, new in RENAMED.items():
        if (value := getattr(args, old)) is not None:
            default = next(item.default for item in fields(args) if item.name == new)
            if getattr(args, new) not in (default, value):
                raise ValueError(f"{old}={value} is the earlier name of {new}={getattr(args, new)}: leave {old} out.")
            warnings.warn(f"{old} is now called {new}, and will go with version 0.3: use that.", FutureWarning, 4)
            setattr(args, new, value)
            setattr(args, old, None)


def as_mapping(option: str, value: Any) -> Any:
    """Read a text as the JSON of a mapping; what is no text is returned as it is.

    Raises:
        ValueError: it is none; shows how one is written.
    """
    if not isinstance(value, str):
        return value
    try:
        mapping = json.loads(value)
    except ValueError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"""{option}={value} is no mapping: write it as JSON, such as '{{"name": "value"}}'.""")
    return mapping


def _number(args: DevFTConfig, option: str) -> Any:
    """An option whose value is to be compared."""
    if isinstance(value := getattr(args, option), str):
        raise ValueError(f"{option}={value!r} is text: give a number.")
    return value


# Options that are lists of numbers, and of which.
_LISTS: dict[str, type] = {
    "stage_layers": Integral,
    "adapter_layers": Integral,
    "client_max_layers": Integral,
    "stage_rounds": Integral,
    "stage_learning_rates": Real,
}
_ONE_FOR_ALL = ("stage_rounds", "stage_learning_rates")  # may be a number alone


def _check_list(option: str, value: Any, kind: type) -> None:
    if value is None and option != "stage_rounds":
        return
    values = value if isinstance(value, (list, tuple)) else [value]
    is_list = values is value or option in _ONE_FOR_ALL
    if not is_list or not all(isinstance(item, kind) for item in values):
        whole = "whole numbers" if kind is Integral else "numbers"
        raise ValueError(f"{option}={value!r}: give a list of {whole}, as [4, 16].")


def _check_values(args: DevFTConfig) -> None:
    """Refuse values that are wrong whatever the other options are, and numbers that contradict each other."""
    for option, kind in _LISTS.items():
        _check_list(option, getattr(args, option), kind)
    if not isinstance(args.federated_method, str):
        raise ValueError(f"federated_method={args.federated_method!r} is no text: join names as in fedit+fedadam.")
    dtype = (args.model_init_kwargs or {}).get("dtype")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"model_init_kwargs: dtype={dtype!r} is unknown: give float32, bfloat16, float16 or auto.")
    for option, choices in CHOICES.items():
        if (value := getattr(args, option)) not in choices and not (value is None and option in _OPEN):
            raise ValueError(f"{option}={value!r} is unknown: choose one of {_names(choices)}.")
    if any(name in OptimizerNames(args.optim).value for name in _UNSUPPORTED_OPTIMIZERS):
        raise ValueError(f"optim={OptimizerNames(args.optim).value!r} cannot start afresh with each client.")
    for option, (neutral, instead) in UNSUPPORTED.items():
        if (value := getattr(args, option)) and value != neutral:
            raise ValueError(f"{option}={value!r} cannot be used with federated stages: {instead}.")
    for option, minimum in _MINIMA.items():
        if (value := _number(args, option)) is not None and value < minimum:
            raise ValueError(f"{option}={value} is too small: give {minimum} or more.")
    for options, is_allowed, instead in _RANGES:
        for option in options:
            if (value := _number(args, option)) is not None and not is_allowed(value):
                raise ValueError(f"{option}={value}: give {instead}.")
    if not args.dataloader_in_order:
        raise ValueError(
            "dataloader_in_order=False would give a client another one's batches, as one loader serves all: leave it "
            "out."
        )
    if args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing: give 1 round or more, or -1 for all of the stages' rounds.")
    if args.round_quorum > args.clients_per_round:
        raise ValueError(
            f"round_quorum={args.round_quorum} can never be reached by clients_per_round={args.clients_per_round}: "
            "lower it."
        )
    if args.num_clients is not None and args.clients_per_round > args.num_clients:
        raise ValueError(
            f"clients_per_round={args.clients_per_round} is more than num_clients={args.num_clients}: lower the one "
            "or raise the other."
        )
    if args.protects_clients and args.dp_delta >= 1 / (args.num_clients or DEFAULT_NUM_CLIENTS):
        raise ValueError(
            f"dp_delta={args.dp_delta} lets one client of {args.num_clients or DEFAULT_NUM_CLIENTS} be laid bare: "
            "give much less than one in as many."
        )
    rule = make_methods(args.federated_method, args.federated_method_kwargs).rule
    if rule is not None and args.round_quorum < rule.needs:
        raise ValueError(
            f"federated_method={args.federated_method!r} needs the updates of {rule.needs} clients: set round_quorum "
            f"to {rule.needs} or more, and clients_per_round to as many."
        )
    if args.partition in ("dirichlet", "natural") and args.partition_column is None:
        raise ValueError(f'partition="{args.partition}" needs `partition_column`, the column to partition over.')
