"""What a run will cost, from its config alone: no weight is read, the model is on the meta device."""

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_devft.configuration import DevFTConfig, Setup, StageConfig, check_compatibility
from hf_devft.federation.methods import C2A, Residual
from hf_devft.federation.methods.hetlora import HetLoRA
from hf_devft.federation.partition import DEFAULT_NUM_CLIENTS, ClientData
from hf_devft.federation.privacy import ADAPTIVE, affordable, split_noise
from hf_devft.federation.sampling import Placement
from hf_devft.models.flops import flops_per_token, forward_flops
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.layout import AdapterLayout
from hf_devft.models.supported import check_adapter
from hf_devft.run.accounts import draws_of, make_accountant
from hf_devft.run.client_batches import lengths_of, make_sampler
from hf_devft.run.planned_messages import planned_messages, planned_turns
from hf_devft.run.planned_submodels import TRAINED_BYTES, PlannedSubmodels, training_memory, whole_stage
from hf_devft.stages.teaching.bridging import bridge_errors_flops, fit_flops
from hf_devft.tasks import answers_prompts
from hf_devft.tasks.data import padded


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
        client_memory_checkpointed: the same with `activation_checkpointing`.
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
    client_memory_checkpointed: int
    server_memory: int


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost, and the same rounds without stages.

    Attributes:
        stages: a plan each; total: of all of them; without_stages: as many rounds of the full model.
        num_clients: in all; None where they are the owners of rows that were not read.
        clients_per_round: sampled for a round.
        measured: whether tokens were counted in the run's data, or as if every row had `max_length` of them.
        has_like_messages: whether messages are as long as the tensors that they tell of, which bytes are counted by.
        noise_multiplier, epsilon, delta: of a run that is differentially private, see `Accountant`; else None, and
            where they depend on rows that were not read.
        protects: whom such a run protects, "client" or "record"; else None.
    """

    stages: list[StagePlan]
    total: StagePlan
    without_stages: StagePlan
    num_clients: int | None
    clients_per_round: int
    measured: bool
    has_like_messages: bool = True
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

    Bytes are those that the ledger will count, but with `flora`, `fedex_lora`, `c2a` and methods with `client_ranks`,
    of which this counts a whole adapter each way. FLOPs are the ledger's formula; of what the server computes,
    calibration and evaluation are not counted. As if all clients held every stage.

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
    examples = clients.examples if clients else []
    everyone = range(len(examples) or args.num_clients or max(DEFAULT_NUM_CLIENTS, args.clients_per_round))
    are_known = bool(examples) or args.num_clients is not None or args.partition != "natural"
    planned = sum(stage.rounds for stage in stages)
    planned = planned if args.max_steps < 0 else min(planned, args.max_steps)
    rounds, privacy = _privacy(args, planned, everyone if are_known else None, examples)
    begun = _begun(stages, rounds)
    ends = np.cumsum([0, *(stage.rounds for stage in begun)]).tolist()
    of_pairs = trainer == "dpo"  # and each stage is its own reference
    turns = functools.partial(planned_turns, args, everyone)
    batches = functools.partial(planned_batches, args, clients, of_pairs)
    all_logits = trainer != "devft" or args.torch_compile or args.label_smoothing_factor > 0  # TRL has its own losses
    submodels = PlannedSubmodels(args, base, peft_config, all_logits)
    plan_stage = functools.partial(_plan_stage, args, submodels, of_pairs, len(everyone))
    layout = AdapterLayout.of(submodels.model(stages[-1])[0])
    setup = Setup(args, trainer, adapter=peft_config, layout=layout, base=base, num_stages=len(stages))
    check_compatibility(setup)
    plans = [
        plan_stage(stage, turns(range(*span)), batches(range(*span)), smaller)
        for stage, span, smaller in zip(begun, itertools.pairwise(ends), [None, *begun[:-1]], strict=True)
    ]
    whole = replace(stages[-1], rounds=rounds)
    full_depth_plan = plan_stage(whole, turns(range(rounds)), batches(range(rounds)))
    without = replace(full_depth_plan, stage="none")
    return RunPlan(
        plans,
        _total(plans),
        without,
        len(everyone) if are_known else None,
        args.clients_per_round,
        clients is not None,
        has_like_messages=not isinstance(setup.methods.method, (Residual, C2A, HetLoRA)),
        **privacy,
    )


def _begun(stages: list[StageConfig], rounds: int) -> list[StageConfig]:
    """The stages that a run of so many rounds begins, each with the rounds that it has of them."""
    starts = itertools.accumulate((stage.rounds for stage in stages), initial=0)
    return [
        replace(stage, rounds=min(stage.rounds, rounds - start))
        for stage, start in zip(stages, starts, strict=False)
        if start < rounds
    ]


def _privacy(
    args: DevFTConfig, rounds: int, everyone: Sequence[int] | None, examples: Sequence[int]
) -> tuple[int, dict[str, Any]]:
    """How many of so many rounds a private run's budget allows, and what protects its clients, as `RunPlan` has it."""
    if not args.is_private:
        return rounds, {}
    if everyone is None or (args.protects_records and not examples):  # what it costs depends on them
        return rounds, {"protects": args.dp_level}
    draws = draws_of(args, ((index, everyone) for index in range(rounds)))
    accountant = make_accountant(args, draws, examples)
    assert accountant is not None
    if args.protects_clients and args.dp_clipping_norm == ADAPTIVE:
        split_noise(accountant.noise_multiplier, args.clients_per_round)  # refuses what the run would
    if args.dp_target_epsilon is not None:  # the run ends before it would spend more
        rounds = affordable(accountant, draws, args.dp_target_epsilon)
    spent = {"epsilon": accountant.epsilon(draws[:rounds]), "delta": args.dp_delta}
    return rounds, {"noise_multiplier": accountant.noise_multiplier, "protects": args.dp_level} | spent


def planned_batches(
    args: DevFTConfig, clients: ClientData | None, of_pairs: bool, rounds: range
) -> list[tuple[int, int]]:
    """(rows, length) of every micro-batch of these rounds, with `client_selection="uniform"` and a collator that pads
    to a multiple of 8; of the longest ones possible where the clients are not known.

    Args:
        of_pairs: whether each row is two, as DPO's are.
    """
    steps = args.local_steps * args.gradient_accumulation_steps
    if clients is None:
        rows = args.train_batch_size * (1 + of_pairs)
        return [(rows, args.max_length)] * (len(rounds) * args.clients_per_round * steps)
    lengths = lengths_of(clients.dataset)
    # One process, which has all of the work.
    order = planned_turns(args, range(len(clients.rows)), rounds)
    sampler = make_sampler(args, clients.dataset, list(clients.rows.values()), order, Placement())
    return [(len(batch), padded(int(lengths[batch].max()))) for batch in sampler]


def _plan_stage(
    args: DevFTConfig,
    submodels: PlannedSubmodels,
    is_reference: bool,
    num_clients: int,
    stage: StageConfig,
    turns: list[tuple[int, int]],
    batches: list[tuple[int, int]],
    smaller: StageConfig | None = None,
) -> StagePlan:
    """Plan a stage that comes after `smaller`."""
    model, base_bytes = submodels.model(stage)
    layout = AdapterLayout.of(model)
    messages = planned_messages(args, layout, num_clients, turns)
    trained = messages.trained
    found = submodels.activations(stage, *max(batches, key=math.prod))
    kept = found.checkpointed if args.activation_checkpointing else found.everything
    returning = 1 - args.client_dropout_rate
    reads_tokens = model.get_base_model().main_input_name == "input_ids"
    positions = [  # of each stack; of an encoder and a decoder that read tokens, as if both had as many
        returning * sum(rows * (length if reads_tokens else longest) for rows, length in batches)
        for longest in found.lengths
    ]
    sum_of_rows = 4 * trained if args.protects_records else 0
    client_memory = training_memory(base_bytes, trained, kept) + sum_of_rows
    row = sum(positions) / (returning * sum(rows for rows, _ in batches))  # padding included
    return StagePlan(
        stage=str(stage.stage),
        num_layers=stage.num_layers,
        rounds=stage.rounds,
        trainable=trained,
        base_bytes=base_bytes,
        bytes_down=messages.down / len(turns),
        bytes_up=messages.up / len(turns),
        bytes=messages.down + returning * messages.up,
        tokens=sum(positions),
        flops=sum(map(operator.mul, positions, _flops_per_token(args, model, messages.skips, is_reference))),
        setup_flops=_teaching_flops(args, submodels, stage, smaller, row),
        client_memory=client_memory,
        client_memory_checkpointed=client_memory - kept + found.checkpointed,
        server_memory=max(
            base_bytes + _SERVER_BYTES * sum(layout.sizes),
            submodels.whole(stage)[1] if stage.has_bridges else 0,
            _healing_memory(args, submodels, stage, kept),
            _distillation_memory(args, submodels, smaller, client_memory),
        ),
    )


def _distillation_memory(
    args: DevFTConfig, submodels: PlannedSubmodels, smaller: StageConfig | None, student: int
) -> int:
    """What a client's training takes, and the smaller submodel that teaches."""
    if not args.distillation_steps or smaller is None:
        return 0
    return student + submodels.model(smaller)[1]


def _healing_memory(args: DevFTConfig, submodels: PlannedSubmodels, stage: StageConfig, kept: int) -> int:
    """The whole base, the submodel's weights with their gradients and moments in float32, and the activations."""
    if not args.healing_steps or stage.num_layers == stage.full_layers:
        return 0
    model, (_, whole_bytes) = submodels.model(stage)[0], submodels.whole(stage)
    layers = find_layer_stack(model.get_base_model(), args.stack).layers
    values = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "lora_" not in name)
    return whole_bytes + TRAINED_BYTES * values + kept


def _teaching_flops(
    args: DevFTConfig,
    submodels: PlannedSubmodels,
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
        whole = submodels.whole(stage)[0].get_base_model()
        positions, depth = round(length * args.calibration_samples), stage.full_layers
        blocks = min(stage.num_layers, depth - stage.num_layers)  # at most
        total += positions * forward_flops(whole) + fit_flops(whole, blocks, positions)
        if args.grouping == "bridged" and smaller is None:  # they hold for all stages
            total += positions * forward_flops(whole) + bridge_errors_flops(whole, depth, positions)
    if args.healing_steps and stage.num_layers < stage.full_layers:
        answers = 0 if smaller else asked  # the base answers once
        total += taught_by(whole_stage(stage), answers, args.healing_steps, 3 * forward_flops(own))
    if args.distillation_steps and smaller is not None:
        steps = args.distillation_steps
        total += taught_by(smaller, asked, steps, sum(flops_per_token(own)))
    return total


def _flops_per_token(
    args: DevFTConfig, model: PeftModel, skips: list[tuple[int, ...]], is_reference: bool
) -> np.ndarray:
    """Of each of the model's stacks, the mean over clients that leave out these layers."""
    layers = find_layer_stack(model.get_base_model(), args.stack).layers
    counts = Counter(skips)
    found = [flops_per_token(model, [layers[index] for index in skipped], is_reference) for skipped in counts]
    return np.average(found, axis=0, weights=list(counts.values()))


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
        client_memory_checkpointed=max(plan.client_memory_checkpointed for plan in plans),
        server_memory=max(plan.server_memory for plan in plans),
    )
