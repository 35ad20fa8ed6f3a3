"""What a run will cost, from its config alone: no weight is read, the model is on the meta device."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from hf_devft.configuration import DevFTConfig, Setup, StageConfig, check_compatibility
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import Clients, make_methods
from hf_devft.federation.partition import DEFAULT_NUM_CLIENTS, ClientData
from hf_devft.federation.privacy import affordable
from hf_devft.federation.sampling import Placement, sample_clients
from hf_devft.federation.wire import Wire
from hf_devft.models.adapter import new_adapter, remap_layers_to_transform, with_head
from hf_devft.models.counted_logits import counts_logits, memory_of_loss
from hf_devft.models.flops import flops_per_token, forward_flops
from hf_devft.models.initialisation import without_weight_based_init
from hf_devft.models.layer_stack import encoders_of, find_layer_stack, watch_lengths, with_layers
from hf_devft.models.layout import AdapterLayout
from hf_devft.models.supported import check_adapter
from hf_devft.run.accounts import draws_of, make_accountant
from hf_devft.run.client_batches import lengths_of, make_sampler
from hf_devft.stages.bridges import add_bridges
from hf_devft.stages.grouping import GroupingTask, group_layers
from hf_devft.stages.teaching.bridging import bridge_errors_flops, fit_flops
from hf_devft.tasks import answers_prompts


# Of a client's trained values in float32: themselves, their gradient, AdamW's two moments.
_TRAINED_BYTES = 16
# Of the server's: the global adapter, the update that has just come, and the float64 sum of those before.
_SERVER_BYTES = 16


@dataclass(frozen=True)
class StagePlan:
    """What a stage will cost.

    Attributes:
        stage: its name; num_layers, rounds: its size.
        trainable: values that a client trains.
        base_bytes: of the submodel's base weights.
        bytes_down, bytes_up: to and from one client in one round, on average.
        bytes: both ways, of all clients in all rounds; flops, tokens (padding included): likewise.
        setup_flops: of the server's bridges, healing and distillation before the first round, in as long texts as the
            clients', the answers to prompts included.
        client_memory: peak in bytes of base, adapter, optimiser and activations of one micro-batch.
        server_memory: peak in bytes of the submodel that it makes, and of aggregation, healing or distillation;
            evaluation is not counted.
    """

    stage: str
    num_layers: int
    rounds: int
    trainable: int
    base_bytes: int
    bytes_down: float
    bytes_up: float
    bytes: float
    tokens: float
    flops: float
    setup_flops: float
    client_memory: int
    server_memory: int


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost, and the same rounds without stages.

    Attributes:
        stages: a plan each; total: of all of them; without_stages: as many rounds of the full model.
        measured: whether tokens were counted in the run's data, or as if every row had `max_length` of them.
        noise_multiplier, epsilon, delta: of a run that is differentially private, see `Accountant`; else None.
        protects: whom such a run protects, "client" or "record"; else None.
    """

    stages: list[StagePlan]
    total: StagePlan
    without_stages: StagePlan
    measured: bool
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    protects: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_run(
    args: DevFTConfig,
    base: PreTrainedModel,
    peft_config: PeftConfig,
    clients: ClientData | None = None,
    trainer: str = "devft",
) -> RunPlan:
    """Plan a run: what it will send, compute and hold in memory.

    Bytes are those that the ledger will count where every message of a method is as long as the first round's: not
    with `flora`, `fedex_lora`, `c2a` and methods with `client_ranks`, of which this counts a whole adapter each way.
    FLOPs are the ledger's formula; of what the server computes, calibration and evaluation are not counted. As if
    all clients held every stage.

    Args:
        base: without adapter; may be on the meta device, see `empty_base`.
        clients: their tokenised rows (`input_ids`), for the lengths of batches; default: every row has `max_length`.
        trainer: "devft", "sft" or "dpo".

    Raises:
        ValueError: what the run's trainer would refuse, as far as the config, the model and the adapter say.
    """
    check_adapter(peft_config, new=True)
    check_compatibility(Setup(args, trainer=trainer, adapter=peft_config, base=base))
    stages = args.resolve_stages(len(find_layer_stack(base, args.stack)))
    ends = np.cumsum([0, *(stage.rounds for stage in stages)]).tolist()
    batches = functools.partial(planned_batches, args, clients)
    submodels = _Submodels(args, base, peft_config, trainer)
    layout = AdapterLayout.of(submodels.model(stages[-1])[0])
    setup = Setup(args, trainer, adapter=peft_config, layout=layout, base=base, num_stages=len(stages))
    check_compatibility(setup)
    plans = [
        _plan_stage(args, submodels, stage, batches(range(*span)), smaller)
        for stage, span, smaller in zip(stages, itertools.pairwise(ends), [None, *stages[:-1]], strict=True)
    ]
    full_depth_plan = _plan_stage(args, submodels, replace(stages[-1], rounds=ends[-1]), batches(range(ends[-1])))
    plan = RunPlan(plans, _total(plans), replace(full_depth_plan, stage="none"), clients is not None)
    examples = clients.examples if clients else []
    if args.protects_records and not examples:
        return replace(plan, protects=args.dp_level)  # what it costs depends on how many rows a client has
    everyone = range(len(examples) or args.num_clients or DEFAULT_NUM_CLIENTS)
    draws = draws_of(args, ((index, everyone) for index in range(ends[-1])))
    if (accountant := make_accountant(args, draws, examples)) is None:
        return plan
    spent = accountant.epsilon(draws)
    if args.dp_target_epsilon is not None:  # the run ends before it would spend more
        spent = accountant.epsilon(draws[: affordable(accountant, draws, args.dp_target_epsilon)])
    noise = accountant.noise_multiplier
    return replace(plan, noise_multiplier=noise, epsilon=spent, delta=args.dp_delta, protects=args.dp_level)


def planned_batches(args: DevFTConfig, clients: ClientData | None, rounds: range) -> list[tuple[int, int]]:
    """(rows, length) of every micro-batch of these rounds, with `client_selection="uniform"` and a collator that pads
    to a multiple of 8; of the longest ones possible where the clients are not known."""
    steps = args.local_steps * args.gradient_accumulation_steps
    if clients is None:
        return [(args.train_batch_size, args.max_length)] * (len(rounds) * args.clients_per_round * steps)
    lengths = lengths_of(clients.dataset)
    everyone = range(len(clients.rows))
    order = [
        (index, client)
        for index in rounds
        for client in sample_clients(everyone, args.clients_per_round, args.seed, index)
    ]
    # One process, which has all of the work.
    sampler = make_sampler(args, clients.dataset, list(clients.rows.values()), order, Placement())
    return [(len(batch), 8 * -(-int(lengths[batch].max()) // 8)) for batch in sampler]


class _Submodels:
    """The submodels of a run's stages by their number of layers, without memory; each is looked at once."""

    def __init__(self, args: DevFTConfig, base: PreTrainedModel, peft_config: PeftConfig, trainer: str):
        self._args, self._base, self._peft_config = args, base, peft_config
        self._all_logits = trainer != "devft" or args.torch_compile  # TRL has losses of its own
        self._stack = find_layer_stack(base, args.stack)
        self._known = functools.cache(self._model), functools.cache(self._activations)

    def model(self, stage: StageConfig) -> tuple[PeftModel, int]:
        """(with its adapter, bytes of its base weights)."""
        return self._known[0](stage.num_layers, tuple(stage.adapted or ()))

    def activations(self, stage: StageConfig, rows: int, length: int) -> tuple[int, list[int]]:
        """See `activations`."""
        return self._known[1](stage.num_layers, tuple(stage.adapted or ()), rows, length)

    def _model(self, layers: int, adapted: tuple[int, ...]) -> tuple[PeftModel, int]:
        args, stack, config = self._args, self._stack, self._peft_config
        groups = group_layers(GroupingTask(stack.kinds, layers), "even")  # of any grouping's sizes
        submodel = with_layers(self._base, stack, [group[0] for group in groups])
        own = stack.names.keeping([group[0] for group in groups]).layers(submodel)
        if args.fusion == "bridge":
            add_bridges(submodel, own, groups)
        stored = _base_bytes(submodel, own, (args.model_init_kwargs or {}).get("quantization_config"))
        if args.temporary_head and layers < len(stack):
            config, _ = with_head(config, submodel)
        config = remap_layers_to_transform(config, [group[0] for group in groups], adapted or None)
        config = without_weight_based_init(config)
        with torch.device("meta"):  # no value is drawn for an adapter that is only looked at
            return new_adapter(submodel, config), stored

    def _activations(self, layers: int, adapted: tuple[int, ...], rows: int, length: int) -> tuple[int, list[int]]:
        all_logits = self._all_logits
        everything, lengths = activations(self._model(layers, adapted)[0], rows, length, all_logits=all_logits)
        if not self._args.activation_checkpointing:
            return everything, lengths
        # Each layer's input, and what one layer at a time keeps when it is computed again.
        inputs, _ = activations(self._model(layers, adapted)[0], rows, length, True, all_logits)
        return min(everything, inputs + everything // (len(adapted) or layers)), lengths


def _plan_stage(
    args: DevFTConfig,
    submodels: _Submodels,
    stage: StageConfig,
    batches: list[tuple[int, int]],
    smaller: StageConfig | None = None,
) -> StagePlan:
    """Plan a stage that comes after `smaller`."""
    model, base_bytes = submodels.model(stage)
    layout = AdapterLayout.of(model)
    down, up, trained = _messages(args, layout)
    encoders = encoders_of(model.get_base_model())
    kept, lengths = submodels.activations(stage, *max(batches, key=math.prod))
    returning = 1 - args.client_dropout_rate
    reads_tokens = model.get_base_model().main_input_name == "input_ids"
    positions = [  # of each stack; of an encoder and a decoder that read tokens, as if both had as many
        returning * sum(rows * (length if reads_tokens else longest) for rows, length in batches)
        for longest in lengths
    ]
    sum_of_rows = 4 * trained if args.protects_records else 0
    client_memory = base_bytes + _TRAINED_BYTES * trained + sum_of_rows + kept
    row = sum(positions) / (returning * sum(rows for rows, _ in batches))  # padding included
    return StagePlan(
        stage=str(stage.stage),
        num_layers=stage.num_layers,
        rounds=stage.rounds,
        trainable=trained,
        base_bytes=base_bytes,
        bytes_down=down,
        bytes_up=up,
        bytes=_traffic(args, stage.rounds, down, up),
        tokens=sum(positions),
        flops=sum(map(operator.mul, positions, flops_per_token(model, encoders=encoders))),
        setup_flops=_teaching_flops(args, submodels, stage, smaller, row),
        client_memory=client_memory,
        server_memory=max(
            base_bytes + _SERVER_BYTES * sum(layout.sizes),
            submodels.model(_whole(stage))[1] if stage.has_bridges else 0,
            _healing_memory(args, submodels, stage, kept),
            _distillation_memory(args, submodels, smaller, client_memory),
        ),
    )


def _distillation_memory(args: DevFTConfig, submodels: _Submodels, smaller: StageConfig | None, student: int) -> int:
    """What a client's training takes, and the smaller submodel that teaches."""
    if not args.distillation_steps or smaller is None:
        return 0
    return student + submodels.model(smaller)[1]


def _healing_memory(args: DevFTConfig, submodels: _Submodels, stage: StageConfig, kept: int) -> int:
    """The whole base, the submodel's weights with their gradients and moments in float32, and the activations."""
    if not args.healing_steps or stage.num_layers == stage.full_layers:
        return 0
    model, (_, whole_bytes) = submodels.model(stage)[0], submodels.model(_whole(stage))
    layers = find_layer_stack(model.get_base_model(), args.stack).layers
    values = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "lora_" not in name)
    return whole_bytes + _TRAINED_BYTES * values + kept


def _teaching_flops(
    args: DevFTConfig,
    submodels: _Submodels,
    stage: StageConfig,
    smaller: StageConfig | None,
    length: float,
) -> float:
    """Of bridges and of healing by the whole base, where the stage has fewer layers, and of distillation from
    `smaller`, on texts of `length` positions, that are answered first where the task is to answer."""
    own, total = submodels.model(stage)[0], 0.0
    asked = args.calibration_samples if answers_prompts(args.task) else 0

    def taught_by(teacher: StageConfig, answers: int, steps: int, flops: float) -> float:
        answering = forward_flops(submodels.model(teacher)[0])
        return length * (answers * answering + steps * args.train_batch_size * (answering + flops))

    if stage.has_bridges:
        whole = submodels.model(_whole(stage))[0].get_base_model()
        positions, depth = round(length * args.calibration_samples), stage.full_layers
        blocks = min(stage.num_layers, depth - stage.num_layers)  # at most
        total += positions * forward_flops(whole) + fit_flops(whole, blocks, positions)
        if args.grouping == "bridged" and smaller is None:  # they hold for all stages
            total += positions * forward_flops(whole) + bridge_errors_flops(whole, depth, positions)
    if args.healing_steps and stage.num_layers < stage.full_layers:
        answers = 0 if smaller else asked  # the base answers once
        total += taught_by(_whole(stage), answers, args.healing_steps, 3 * forward_flops(own))
    if args.distillation_steps and smaller is not None:
        steps = args.distillation_steps
        total += taught_by(smaller, asked, steps, sum(flops_per_token(own)))
    return total


def _whole(stage: StageConfig) -> StageConfig:
    """The stage of the whole model."""
    return replace(stage, num_layers=stage.full_layers, adapted=None)


def _base_bytes(model: PreTrainedModel, layers: list[nn.Module], quantization: dict[str, Any] | None) -> int:
    """Bytes of the weights; bitsandbytes packs the layers' matrices, with a scale for each block of 64 values."""
    quantization = quantization or {}
    total = sum(parameter.nbytes for parameter in model.parameters())
    packed = [m.weight for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if quantization.get("load_in_4bit"):
        scale = 1 / 64 + 4 / (64 * 256) if quantization.get("bnb_4bit_use_double_quant") else 4 / 64
        return total - sum(round(weight.nbytes - weight.numel() * (0.5 + scale)) for weight in packed)
    if quantization.get("load_in_8bit"):
        return total - sum(weight.nbytes - weight.numel() for weight in packed)
    return total


def planned_traffic(args: DevFTConfig, layout: AdapterLayout, rounds: int) -> float:
    """Bytes that rounds with an adapter of this layout will send, both ways, of all clients; see `plan_run`."""
    down, up, _ = _messages(args, layout)
    return _traffic(args, rounds, down, up)


def _traffic(args: DevFTConfig, rounds: int, down: float, up: float) -> float:
    """Bytes of all clients in some rounds, of which one client's messages have so many each way."""
    return args.clients_per_round * rounds * (down + (1 - args.client_dropout_rate) * up)


def _messages(args: DevFTConfig, layout: AdapterLayout) -> tuple[float, float, int]:
    """Bytes to a client and from it in a round, and the values that it trains: means over the first two rounds, as
    some methods take turns."""
    memory = Memory()
    method, correction, *_ = make_methods(args.federated_method, args.federated_method_kwargs)
    count = args.num_clients or DEFAULT_NUM_CLIENTS
    labels = np.ones((count, 2))  # of which the messages' sizes do not depend
    method.begin_run(Clients(examples=[1] * count, seed=args.seed, memory=memory, label_counts=lambda: labels))
    method.begin_stage(layout, torch.zeros(sum(layout.sizes)))
    wire = Wire(args.wire_dtype, args.upload_fraction, memory)
    both = 2 if correction is not None and correction.records else 1
    rounds = []
    for method.round_index in range(2):
        values = [
            sum(layout.sizes[place] for place in places(0))
            for places in (method.receives, method.sends, method.trains)
        ]
        rounds.append((both * wire.bytes_down(values[0]), both * wire.bytes_up(values[1]), values[2]))
    down, up, trained = zip(*rounds, strict=True)
    return sum(down) / len(down), sum(up) / len(up), max(trained)


def _total(plans: Sequence[StagePlan]) -> StagePlan:
    last = plans[-1]
    return StagePlan(
        stage="all",
        num_layers=last.num_layers,
        rounds=sum(plan.rounds for plan in plans),
        trainable=last.trainable,
        base_bytes=last.base_bytes,
        bytes_down=sum(plan.rounds * plan.bytes_down for plan in plans) / sum(plan.rounds for plan in plans),
        bytes_up=sum(plan.rounds * plan.bytes_up for plan in plans) / sum(plan.rounds for plan in plans),
        bytes=sum(plan.bytes for plan in plans),
        tokens=sum(plan.tokens for plan in plans),
        flops=sum(plan.flops for plan in plans),
        setup_flops=sum(plan.setup_flops for plan in plans),
        client_memory=max(plan.client_memory for plan in plans),
        server_memory=max(plan.server_memory for plan in plans),
    )


@dataclass(eq=False)
class _Kept:
    """A tensor that is kept for the backward pass, for as long as it is."""

    tensor: torch.Tensor


def activations(
    model: PeftModel, rows: int, length: int, checkpointing: bool = False, all_logits: bool = True
) -> tuple[int, list[int]]:
    """What a forward pass of `rows` rows keeps for the backward pass, in bytes, with the gradient of the largest of
    it; and the lengths of the sequences that went through each stack of layers. Found by running it on tensors without
    memory.

    Args:
        model: with its adapter; of no use afterwards.
        length: tokens of a row (samples, of a model that reads sound waves).
        checkpointing: whether layers are computed again in the backward pass.
        all_logits: whether the loss is computed as the model does it, or in pieces where that can be; see
            `count_logits`.
    """
    base = model.get_base_model()
    example: dict[str, Any] = _example(base, rows, length)
    after = moment = 0
    if not all_logits and counts_logits(base):
        after, moment = memory_of_loss(base, rows * length)
        example = {"input_ids": example["input_ids"], "logits_to_keep": 1}
    kept: WeakSet[_Kept] = WeakSet()  # not what nothing needs any more, such as inputs of layers without gradient

    def pack(tensor: torch.Tensor) -> _Kept:
        kept.add(saved := _Kept(tensor))
        return saved

    # Not on the meta device, where attention takes a slower path that keeps its scores.
    with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(pack, lambda saved: saved.tensor):
        model = model.to_empty(device="cpu").train()
        ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        model.config.use_cache = False  # as `Trainer` has it
        if checkpointing:
            base.activation_checkpointing_enable()
            base.disable_input_require_grads()  # as in a run, but for reentrant checkpointing
        lengths, _ = watch_lengths(base)
        output = model(**example)
        sizes_of = {(storage := saved.tensor.untyped_storage())._cdata: storage.nbytes() for saved in kept}
        sizes = [size for key, size in sizes_of.items() if key not in ours]
        del output
    return sum(sizes) + after + max(moment, *sizes, 0), lengths


def _example(model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch as the model reads it; with labels where they are tokens."""
    config, name = model.config, model.main_input_name
    tokens = torch.zeros(rows, length, dtype=torch.long)
    inputs = {
        "input_ids": lambda: tokens,
        "pixel_values": lambda: torch.zeros(rows, config.num_channels, *[config.image_size] * 2),
        "input_features": lambda: torch.zeros(rows, config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: torch.zeros(rows, length),
    }
    if name not in inputs:
        raise ValueError(f"{type(model).__name__} reads {name}: a plan knows {', '.join(inputs)}.")
    return {name: inputs[name]()} | ({"labels": tokens} if model.get_output_embeddings() is not None else {})
