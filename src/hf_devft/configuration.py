"""What a run is: `DevFTConfig` (what the user says) and `StageConfig` (what one stage came to)."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.training_args import OptimizerNames
from transformers.utils import PushToHubMixin


STAGE_CONFIG_NAME = "stage_config.json"

# The names that configs may use. The rules themselves stand in `stages` and `federation`, whose registries
# a test holds against these; this module knows nobody.
GROUPINGS = ("deconfliction", "even", "random", "calibrated", "prefix")
FUSIONS = ("differential", "mean", "sum", "anchor")
TRANSFERS = ("broadcast", "anchor", "split")
TASKS = (
    "text-generation", "text2text-generation", "text-classification", "token-classification", "image-classification",
    "audio-classification", "automatic-speech-recognition",
)  # fmt: skip
ANSWERING = (None, "text-generation")  # whose rows are prompts and answers; None is of a trainer that says nothing
STACKS = ("encoder", "decoder")
PARTITIONS = ("iid", "dirichlet", "natural")
FEDERATED_METHODS = (
    "fedit", "ffa_lora", "fedsa_lora", "rolora", "flora", "fedex_lora", "flexlora", "hlora", "hetlora", "c2a", "dofit",
    "droppeft",
)  # fmt: skip
LOCAL_CORRECTIONS = ("fedprox", "scaffold")
SERVER_OPTIMIZERS = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")
WIRE_DTYPES = ("fp32", "bf16", "int8", "int4")
BEYOND_CAPACITY = ("sit_out", "keep_last")
CLIENT_SELECTIONS = ("uniform", "by_size", "resource_aware")
CLIENT_PLACEMENTS = ("client_parallel", "data_parallel")

# Options of `TrainingArguments` that have no meaning here, the value that says nothing, and what to use instead.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "num_train_epochs": (3.0, "an epoch is a stage here: set `stage_layers` and `stage_rounds`"),
    "fsdp": (None, "shard with DeepSpeed ZeRO-3 instead (recipes/accelerate/zero3.yaml)"),
    "parallelism_config": (None, "tensor, context and sequence parallelism are not implemented"),
    "train_sampling_strategy": ("random", "clients shuffle their own rows"),
    "neftune_noise_alpha": (None, "noise on the embeddings is not implemented"),
    "use_liger_kernel": (False, "Liger kernels are not implemented"),
    "debug": ([], "use `torch.autograd.set_detect_anomaly`"),
    "ignore_data_skip": (False, "a resumed run draws just the batches that are still to come"),
    "dataloader_persistent_workers": (False, "one data loader serves a whole run anyway"),
}
# Optimisers that keep the parameters in a state of their own between steps, or step within the backward pass.
_UNSUPPORTED_OPTIMIZERS = ("schedule_free", "lomo", "adalomo", "layerwise")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")


def refuse(option: str, obstacles: dict[str, bool]) -> None:
    """Raise for what stands against an option.

    Args:
        option: as it was given.
        obstacles: what stands against it and what to change -> whether it does.

    Raises:
        ValueError: the first of them that does.
    """
    for obstacle, stands in obstacles.items():
        if stands:
            raise ValueError(f"{option} is not possible: {obstacle}.")


def _one_or_many(name: str, value: Any, count: int) -> list:
    """`value` as a list of one entry per stage."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ValueError(
            f"{name}={values} has {len(values)} entries: give one for all, or one for each of {count} stages."
        )
    return values * count if len(values) == 1 else values


@dataclass
class DevFTConfig(TrainingArguments):
    """
    Arguments of a developmental federated run: those of [`~transformers.TrainingArguments`] and the following.

    The Trainer's *step* is a communication round and its *epoch* a stage, so `logging_steps`, `eval_steps`,
    `save_steps`, `max_steps`, `warmup_steps` and `lr_scheduler_type` count or act on rounds, and the `"epoch"`
    strategies act at the ends of stages. `learning_rate`, the batch size, accumulation, clipping and the
    optimiser are those of local training.

    > Parameters that control the stages

        stage_layers (`list[int]`, *optional*):
            Layers of each stage's submodel, increasing, the last one the model's depth L. By default derived
            from `initial_layers` and `growth_factor`.
        initial_layers (`int`, *optional*, defaults to `4`):
            Layers of the first stage where `stage_layers` is not given (the paper starts at 4).
        growth_factor (`float`, *optional*, defaults to `2.0`):
            Growth from stage to stage where `stage_layers` is not given, ending at L (paper: doubling).
        stage_rounds (`int` or `list[int]`, *optional*, defaults to `75`):
            Rounds of each stage: one value, or one per stage.
        stage_learning_rates (`float` or `list[float]`, *optional*, defaults to `learning_rate`):
            Learning rate of each stage before the schedule: one value, or one per stage.

    > Parameters that control the rules of a stage

        grouping (`str`, *optional*, defaults to `"deconfliction"`):
            Which layers share a group: `"deconfliction"` (paper), `"even"`, `"random"`, `"calibrated"`, or
            `"prefix"`, the first layers, as ProgFed grows (with `fusion` and `transfer` `"anchor"`).
        calibration_samples (`int`, *optional*, defaults to `32`):
            Texts of the server's, from `calibration_dataset`, that `"calibrated"` grouping measures the loss on (else
            from `eval_dataset`), and that `healing_steps` and `distillation_steps` ask.
        fusion (`str`, *optional*, defaults to `"anchor"`):
            A group's representative: `"differential"` (paper), `"mean"`, `"sum"`, or `"anchor"`, its first layer as it
            is (our choice: with `"broadcast"` the best of benchmarks/results/quickstart.md and
            ablations.md, by little).
        fusion_beta (`float`, *optional*, defaults to `0.1`):
            β of differential fusion (paper: 0.1).
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
            `"fedadagrad"`, `"fedadam"`, `"fedyogi"`) can be joined: `"ffa_lora+fedprox+fedadam"`; without a method
            they stand on `"fedit"`.
        federated_method_kwargs (`dict` or `str`, *optional*):
            Options of what `federated_method` names, such as `{"mu": 0.1}`; see docs/methods.md.
        wire_dtype (`str`, *optional*, defaults to `"fp32"`):
            Encoding of what travels, both ways: `"fp32"`, `"bf16"`, or blockwise `"int8"` or `"int4"`, upwards with
            error feedback.
        wire_top_k (`float`, *optional*, defaults to `1.0`):
            Part of the values that a client sends, the largest changes, with error feedback.
        client_selection (`str`, *optional*, defaults to `"uniform"`):
            Which clients a round asks: `"uniform"`, `"by_size"` (chances in proportion to their examples) or
            `"resource_aware"` (REFL: those first that will soon be gone; updates may come late).
        client_selection_kwargs (`dict` or `str`, *optional*):
            Options of the selection, such as `{"wait_for": 0.8}`.
        client_resources (`str`, *optional*):
            Speeds, bandwidths and times of the clients, for a simulated clock in the ledger: a JSON file (see
            `load_resources`), or `"simulated"` for made-up ones (the default of `"resource_aware"`).
        client_max_layers (`list[int]`, *optional*):
            Most layers that a client can train, for the clients in turns.
        beyond_capacity (`str`, *optional*, defaults to `"sit_out"`):
            What a client does in stages of more layers: `"sit_out"`, or `"keep_last"`, train the last stage's submodel
            that it can hold, from and for the running stage's adapter.
        client_dropout_rate (`float`, *optional*, defaults to `0.0`):
            Probability that a sampled client receives the adapter but is not heard of again (a simulation).
        round_quorum (`int`, *optional*, defaults to `1`):
            How many clients of a round must return a finite adapter. The others are left out.
        round_retries (`int`, *optional*, defaults to `3`):
            How often a round below its quorum is tried again, with other clients, before the run stops.
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
            the model's class says.
        dataset_num_proc (`int`, *optional*):
            Processes that encode the rows.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` where the model is given by name.
        max_length (`int`, *optional*, defaults to `512`):
            Tokens that a prompt with its completion is cut to (paper: 512).
        resume_from_hub (`str`, *optional*):
            Repository that an earlier run has pushed to: go on with the stage after its last one.
        card_license (`str`, *optional*):
            Metadata of the model card: licence of the adapter.
        card_language (`list[str]`, *optional*):
            Metadata of the model card: languages (ISO 639-1).
        card_datasets (`list[str]`, *optional*):
            Metadata of the model card: names of the datasets on the Hub.
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

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "federated_method_kwargs",
        "client_selection_kwargs",
    ]

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
    grouping: str = field(default="deconfliction", metadata={"help": f"Which layers share a group: {GROUPINGS}."})
    calibration_samples: int = field(
        default=32, metadata={"help": "The server's texts, for calibrated grouping, healing and distillation."}
    )
    fusion: str = field(default="anchor", metadata={"help": f"A group's representative: {FUSIONS}."})
    fusion_beta: float = field(default=0.1, metadata={"help": "Beta of differential fusion."})
    stack: str | None = field(
        default=None, metadata={"help": f"The stack of an encoder-decoder model to shorten: {STACKS}. Default: both."}
    )
    transfer: str = field(default="broadcast", metadata={"help": f"Who receives a group's adapter: {TRANSFERS}."})
    adapter_fusion: str | None = field(
        default=None, metadata={"help": "How a stage's adapter starts; the names of fusion. Default: fusion."}
    )
    healing_steps: int = field(
        default=0,
        metadata={"help": "Steps on the server that teach a submodel's layers to stand for all."},
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
    partition: str = field(default="iid", metadata={"help": f"How a dataset is cut into clients: {PARTITIONS}."})
    partition_column: str | None = field(default=None, metadata={"help": "Column for dirichlet and natural."})
    dirichlet_alpha: float = field(default=0.5, metadata={"help": "Concentration of the Dirichlet partition."})
    federated_method: str = field(
        default="fedit",
        metadata={
            "help": f"One of {FEDERATED_METHODS}, joined by + with {LOCAL_CORRECTIONS} and {SERVER_OPTIMIZERS}."
        },
    )
    federated_method_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the federated method, as JSON."}
    )
    wire_dtype: str = field(default="fp32", metadata={"help": f"Encoding of what travels: {WIRE_DTYPES}."})
    wire_top_k: float = field(default=1.0, metadata={"help": "Part of the values that a client sends."})
    client_selection: str = field(default="uniform", metadata={"help": f"Who takes part: {CLIENT_SELECTIONS}."})
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
        default="sit_out", metadata={"help": f"What clients do in stages that they cannot hold: {BEYOND_CAPACITY}."}
    )
    client_dropout_rate: float = field(default=0.0, metadata={"help": "Probability that a client drops out."})
    round_quorum: int = field(default=1, metadata={"help": "Clients that must return a finite adapter."})
    round_retries: int = field(default=3, metadata={"help": "Retries of a round below its quorum."})
    client_placement: str | None = field(
        default=None,
        metadata={"help": f"Placement of work on processes: {CLIENT_PLACEMENTS}. Default: as the launch says."},
    )
    task: str | None = field(default=None, metadata={"help": f"What the model is for: {TASKS}."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that encode the rows."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, as JSON."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens that a prompt with its completion is cut to."})
    resume_from_hub: str | None = field(
        default=None, metadata={"help": "Repository of an earlier run: go on with the stage after its last one."}
    )
    card_license: str | None = field(default=None, metadata={"help": "Model card: licence of the adapter."})
    card_language: list[str] | None = field(default=None, metadata={"help": "Model card: languages, ISO 639-1."})
    card_datasets: list[str] | None = field(default=None, metadata={"help": "Model card: datasets on the Hub."})
    client_eval_size: float | None = field(
        default=None, metadata={"help": "Part of each client's rows to evaluate on, client by client."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Measure exact match by generation at each stage's end."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer, in tokens."})

    def __post_init__(self):
        if self.deepspeed and not is_deepspeed_available():
            raise ImportError("DeepSpeed is not installed: pip install 'hf-devft[deepspeed]'")
        # Several processes without an accelerator would each take itself for the only one.
        self.use_cpu |= int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
        super().__post_init__()
        self.adapter_fusion = self.adapter_fusion or self.fusion
        if any(name in OptimizerNames(self.optim).value for name in _UNSUPPORTED_OPTIMIZERS):
            raise ValueError(f"optim={OptimizerNames(self.optim).value!r} cannot start afresh with each client.")
        self._n_gpu = min(self.n_gpu, 1)  # one process, one device: clients are not spread by DataParallel
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns of it on every data loader
        _choice("grouping", self.grouping, GROUPINGS)
        _choice("fusion", self.fusion, FUSIONS)
        _choice("adapter_fusion", self.adapter_fusion, FUSIONS)
        _choice("transfer", self.transfer, TRANSFERS)
        if self.task is not None:
            _choice("task", self.task, TASKS)
        if self.stack is not None:
            _choice("stack", self.stack, STACKS)
        _choice("partition", self.partition, PARTITIONS)
        _choice("beyond_capacity", self.beyond_capacity, BEYOND_CAPACITY)
        _choice("client_selection", self.client_selection, CLIENT_SELECTIONS)
        _choice("wire_dtype", self.wire_dtype, WIRE_DTYPES)
        if self.grouping == "prefix" and {self.fusion, self.adapter_fusion, self.transfer} != {"anchor"}:
            raise ValueError(
                'grouping="prefix" leaves the layers above out: set fusion="anchor" and transfer="anchor", so that '
                "they neither give nor receive."
            )
        self._check_teaching()
        for name, (neutral, instead) in UNSUPPORTED.items():
            if (value := getattr(self, name)) and value != neutral:
                raise ValueError(f"{name}={value!r} cannot be used with federated stages: {instead}.")
        self._place()
        self._check_numbers()
        self._check_partition()
        if self.stage_layers is not None:
            self.stage_layers = list(self.stage_layers)
            self.resolve_stages(self.stage_layers[-1] if self.stage_layers else 0)

    def _place(self) -> None:
        """Settle how work is placed on the processes that were launched."""
        deepspeed = self.deepspeed_plugin is not None
        if self.client_placement is None:
            self.client_placement = "data_parallel" if deepspeed else "client_parallel"
        _choice("client_placement", self.client_placement, CLIENT_PLACEMENTS)
        together = self.client_placement == "data_parallel"
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ValueError("FSDP is not supported: shard with DeepSpeed ZeRO-3 (recipes/accelerate/zero3.yaml).")
        for name, instead in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
            if deepspeed and name in self.deepspeed_plugin.deepspeed_config:
                raise ValueError(f"the DeepSpeed config has its own {name}: leave it out, and set `{instead}`.")
        if deepspeed and not together:
            raise ValueError('DeepSpeed trains each client on all processes: set client_placement="data_parallel".')
        if deepspeed and self.deepspeed_plugin.zero_stage == 3 and self.grouping == "calibrated":
            raise ValueError(
                'grouping="calibrated" measures many submodels, which are not whole anywhere under ZeRO-3: group with '
                "another rule, or use ZeRO-2."
            )
        if self.auto_find_batch_size and together and (deepspeed or self.world_size > 1):
            raise ValueError(
                'auto_find_batch_size cannot be used with client_placement="data_parallel", as processes run out of '
                "memory one by one: lower `per_device_train_batch_size` and raise `gradient_accumulation_steps`."
            )
        # A client's tokens count against each other, on however many processes it is; never against another client's.
        self.average_tokens_across_devices = together
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # an adapter is on all layers, and torch warns of the search

    def _check_numbers(self) -> None:
        minima = {
            "initial_layers": 1, "calibration_samples": 1, "num_clients": 1, "clients_per_round": 1,
            "local_steps": 1, "clients_per_batch": 1, "max_length": 2, "max_eval_samples": 1,
            "generation_max_new_tokens": 1, "dataset_num_proc": 1, "round_quorum": 1, "round_retries": 0,
            "distillation_steps": 0, "healing_steps": 0,
        }  # fmt: skip
        for name, minimum in minima.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ValueError(f"{name}={value} is too small: give {minimum} or more.")
        if self.client_max_layers is not None and (not self.client_max_layers or min(self.client_max_layers) < 1):
            raise ValueError(f"client_max_layers={self.client_max_layers}: give numbers of layers, 1 or more each.")
        if self.round_quorum > self.clients_per_round:
            raise ValueError(
                f"round_quorum={self.round_quorum} can never be reached by clients_per_round={self.clients_per_round}."
            )
        if not 0 <= self.client_dropout_rate < 1:
            raise ValueError(f"client_dropout_rate={self.client_dropout_rate}: give a probability from 0 to below 1.")
        if self.client_eval_size is not None and not 0 < self.client_eval_size < 1:
            raise ValueError(f"client_eval_size={self.client_eval_size}: give a part above 0, below 1.")
        if not 0 < self.wire_top_k <= 1:
            raise ValueError(f"wire_top_k={self.wire_top_k}: give a part above 0, up to 1.")
        if self.growth_factor <= 1:
            raise ValueError(f"growth_factor={self.growth_factor} does not grow: give a factor above 1.")
        for name in ("learning_rate", "healing_learning_rate"):
            if (rate := getattr(self, name)) <= 0:
                raise ValueError(f"{name}={rate}: give a rate above 0.")
        if self.dirichlet_alpha <= 0:
            raise ValueError(f"dirichlet_alpha={self.dirichlet_alpha}: give a concentration above 0.")
        if self.num_clients is not None and self.clients_per_round > self.num_clients:
            raise ValueError(
                f"clients_per_round={self.clients_per_round} is more than num_clients={self.num_clients}: lower "
                "the one or raise the other."
            )

    def _check_teaching(self) -> None:
        obstacles = {
            "generation_max_new_tokens leaves no room for prompts in max_length: lower it": (
                self.generation_max_new_tokens >= self.max_length
            ),
            "under ZeRO-3 no process has a whole submodel: use ZeRO-2": (
                self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3
            ),
        }
        if self.healing_steps:
            refuse(f"healing_steps={self.healing_steps}", obstacles)
        if self.distillation_steps:
            refuse(f"distillation_steps={self.distillation_steps}", obstacles | {
                'transfer="split" gives no layer back what it learned from: set "broadcast" or "anchor"': (
                    self.transfer == "split"
                ),
                "temporary_head is dropped before its stage could be asked: leave it out": self.temporary_head,
            })  # fmt: skip

    def _check_partition(self) -> None:
        if self.partition in ("dirichlet", "natural") and self.partition_column is None:
            raise ValueError(f'partition="{self.partition}" needs `partition_column`, the column to partition over.')

    def resolve_stages(self, num_layers: int) -> list["StageConfig"]:
        """The stages of a run on a model of `num_layers` layers.

        Raises:
            ValueError: capacities that do not increase from at least 1 to exactly `num_layers`, or a list of rounds
                or learning rates that is neither one value nor one per stage.
        """
        layers = self.stage_layers or self._derived_layers(num_layers)
        if any(a >= b for a, b in zip([0, *layers], layers, strict=False)) or layers[-1] != num_layers:
            raise ValueError(
                f"stage_layers={layers} must increase from 1 or more and end at the model's {num_layers} layers, "
                f"such as {self._derived_layers(num_layers)}."
            )
        rounds = _one_or_many("stage_rounds", self.stage_rounds, len(layers))
        rates = _one_or_many("stage_learning_rates", self.stage_learning_rates or self.learning_rate, len(layers))
        if min(rounds) < 1:
            raise ValueError(f"stage_rounds={rounds}: give each stage 1 round or more.")
        if min(rates) <= 0:
            raise ValueError(f"stage_learning_rates={rates}: give each stage a rate above 0.")
        return [
            StageConfig(
                stage=index + 1,
                num_stages=len(layers),
                num_layers=layers[index],
                full_layers=num_layers,
                rounds=rounds[index],
                learning_rate=rates[index],
                grouping=self.grouping,
                fusion=self.fusion,
                fusion_beta=self.fusion_beta,
                transfer=self.transfer,
                adapter_fusion=self.adapter_fusion,
                stack=self.stack,
                task=self.task or "text-generation",
                federated_method=self.federated_method,
                healing_steps=self.healing_steps if layers[index] < num_layers else 0,
            )
            for index in range(len(layers))
        ]

    def _derived_layers(self, num_layers: int) -> list[int]:
        layers, size = [], float(min(self.initial_layers, num_layers))
        while round(size) < num_layers:
            layers.append(round(size))
            size = max(size * self.growth_factor, size + 1)
        return [*layers, num_layers]


@dataclass
class StageConfig(PushToHubMixin):
    """The record of one stage, saved beside its adapter as `stage_config.json`.

    Attributes:
        stage, num_stages: this stage (from 1) of how many.
        num_layers, full_layers: layers of the submodel (L_s) and of the base (L).
        rounds, learning_rate: communication rounds, and the learning rate before the schedule.
        grouping, fusion, fusion_beta, transfer, adapter_fusion, stack: the rules; see `DevFTConfig`.
        task: what the model is for; see `DevFTConfig`. labels: of its classes, in order.
        federated_method: how updates were combined.
        healing_steps: those that the submodel's layers were healed in; where there are some, their weights are in
            `submodel/healed-N.safetensors`.
        groups: the layers of the base in each group, as they were found.
        base_model_name_or_path, base_model_revision: the base.
        rounds_done: rounds that ran; fewer than `rounds` where the stage ended early.
        metrics: evaluation of the round that the stage handed on: of the submodel (`eval_*`), where there was one
            then, and at full depth (`eval_full_*`).
        totals: the ledger's totals of this stage (bytes, tokens, FLOPs, seconds, peak memory), and beside them
            `setup_seconds` (grouping, calibration, fusion, healing, distillation), `setup_flops` (healing and
            distillation, on the server) and `base_bytes` (the submodel's base weights).
    """

    stage: int
    num_stages: int
    num_layers: int
    full_layers: int
    rounds: int
    learning_rate: float
    grouping: str = "deconfliction"
    fusion: str = "anchor"
    fusion_beta: float = 0.1
    transfer: str = "broadcast"
    adapter_fusion: str = "anchor"
    stack: str | None = None
    task: str = "text-generation"
    labels: list[str] | None = None
    federated_method: str = "fedit"
    healing_steps: int = 0
    groups: list[list[int]] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    rounds_done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write `stage_config.json` into a folder. What `push_to_hub` passes on for models is ignored."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{STAGE_CONFIG_NAME}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(folder / STAGE_CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "StageConfig":
        """Read `stage_config.json` from a folder or a Hub repository. Keys of newer versions are ignored.

        Raises:
            OSError: the file is not there.
            ValueError: it is not a stage's record.
        """
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / (subfolder or "") / STAGE_CONFIG_NAME
        else:
            path = hf_hub_download(
                str(name_or_path), STAGE_CONFIG_NAME, subfolder=subfolder, revision=revision, token=token
            )
        try:
            content = json.loads(Path(path).read_text())
            known = {item.name for item in fields(cls)}
            config = cls(**{key: value for key, value in content.items() if key in known})
            config._check()
            return config
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a stage's record: {error}") from error

    def _check(self) -> None:
        """Refuse what no run writes, before anything is built from it."""
        for name in ("stage", "num_stages", "num_layers", "full_layers", "rounds"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if type(self.fusion_beta) not in (int, float) or not isinstance(self.metrics, dict):
            raise ValueError("fusion_beta or metrics are of another type")
        if self.stack not in (None, *STACKS) or not isinstance(self.labels, list | None):
            raise ValueError(f"stack={self.stack!r} or labels={self.labels!r} are none")
        if self.groups is None:
            return
        layers = sorted(layer for group in self.groups for layer in group)
        if (
            len(layers) != self.full_layers
            or layers != list(range(len(layers)))
            or len(self.groups) != self.num_layers
            or not all(self.groups)
        ):
            raise ValueError(f"groups={self.groups!r} are not {self.num_layers} groups of {self.full_layers} layers")
