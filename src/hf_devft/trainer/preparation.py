"""What is settled before a trainer is built on its model: clients, adapter, stages. All of it raises before any work
is spent."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_devft.configuration import DevFTConfig, Setup, StageConfig, check_compatibility
from hf_devft.federation.heterogeneity.capacity import Capacities
from hf_devft.federation.methods import make_methods
from hf_devft.federation.partition import ClientData, hold_out, make_clients
from hf_devft.models.adapter import adapter_state, chooses_layers, load_adapter_state
from hf_devft.models.adapter_files import check_ranks
from hf_devft.models.initialisation import initialise, moves_weights, without_weight_based_init
from hf_devft.models.layer_stack import LayerStack
from hf_devft.models.layout import AdapterLayout, lora_scaling
from hf_devft.models.residual import PatchedBaseWeights
from hf_devft.models.supported import check_adapter
from hf_devft.models.weights import is_stored, keep_readable
from hf_devft.run.accounts import make_accountant
from hf_devft.run.client_batches import lengths_of
from hf_devft.run.comparison import read_curve
from hf_devft.run.healed_layers import HealedLayers
from hf_devft.stages.builder import layer_stack
from hf_devft.stages.global_adapter import GlobalAdapter
from hf_devft.stages.grouping import GroupingTask, group_layers
from hf_devft.stages.transfer import check_alike
from hf_devft.tasks.data import first_rows
from hf_devft.trainer.federated_run import FederatedRun, planned_draws
from hf_devft.trainer.federation_builder import build_federation
from hf_devft.trainer.interface import FederatedTrainer
from hf_devft.trainer.overrides import check_overrides, is_overridden
from hf_devft.trainer.precision import advise_float32


logger = logging.getLogger(__name__)


def clients_of(args: DevFTConfig, train_dataset: Any, partitioner: Any = None) -> ClientData:
    """Make the clients that `args` asks for; see `make_clients`."""
    return make_clients(
        train_dataset,
        partitioner,
        num_clients=args.num_clients,
        kind=args.partition,
        column=args.partition_column,
        alpha=args.dirichlet_alpha,
        seed=args.seed,
    )


def clients_and_evaluation(
    args: DevFTConfig, train_dataset: Any, eval_dataset: Any, partitioner: Any
) -> tuple[ClientData, Dataset | dict[str, Dataset] | None]:
    """Make the clients, and the rows to evaluate on, which may be held out of theirs.

    Args:
        train_dataset: the clients' rows, or `ClientData`.

    Raises:
        ValueError: held-out rows beside given ones, or fewer clients than a round asks.
    """
    clients = clients_of(args, train_dataset, partitioner)
    if args.client_eval_size is not None:
        if eval_dataset is not None:
            raise ValueError(
                "client_eval_size holds the clients' own rows out: leave out others, `eval_dataset`, "
                "or on a command line `eval_file` and `eval_fraction`."
            )
        clients, eval_dataset = hold_out(clients, args.client_eval_size, args.seed)
    check_enough(args, len(clients.rows))
    return clients, first_rows(eval_dataset, args.max_eval_samples)


def check_enough(args: DevFTConfig, clients: int) -> None:
    """Refuse a run whose rounds ask more clients than there are.

    Raises:
        ValueError: says so.
    """
    if args.clients_per_round > clients:
        there = "there is 1 client" if clients == 1 else f"there are {clients} clients"
        raise ValueError(f"clients_per_round={args.clients_per_round}, but {there}: lower it.")


def prepare_peft_config(
    config: PeftConfig, args: DevFTConfig, trainer: str = "devft"
) -> tuple[PeftConfig, str | None]:
    """Check a new adapter's config; returns that by which PEFT is to make it, and the initialisation that is left to
    us because it takes a part of the base's weights (PiSSA, OLoRA), or None.

    Raises:
        ValueError: an adapter that cannot be trained; before the model is loaded.
    """
    check_adapter(config, new=True)
    check_compatibility(Setup(args, trainer=trainer, adapter=config))
    return without_weight_based_init(config), config.init_lora_weights if moves_weights(config) else None


def adapter_config_of(model: Any, initialisation: str | None) -> PeftConfig:
    """Copy the config of a model's one adapter.

    Raises:
        ValueError: there is none, or there are several; or one that stages cannot carry.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("the model has no adapter to train: pass `peft_config=LoraConfig(...)`.")
    if len(model.peft_config) != 1:
        raise ValueError(f"the model has several adapters {list(model.peft_config)}: leave one.")
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "the model's adapter is merged into its weights, on which stages would train it again: call "
            "`model.unmerge_adapter()`, or pass `model.merge_and_unload()` with `peft_config`."
        )
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = False
    config.revision = getattr(model.get_base_model().config, "_commit_hash", None) or config.revision
    check_adapter(config)
    _check_trained_parts(model)
    if initialisation is not None:
        config.init_lora_weights = initialisation
    return config


def _check_trained_parts(model: PeftModel) -> None:
    """Refuse a model in which other parameters are to be trained than its adapter's: each stage makes an adapter of
    its own. One that was loaded for inference, in which nothing is, will be trained.

    Raises:
        ValueError: says which parameters, and what to do instead.
    """
    parts = (f".{model.base_model.prefix}", f".modules_to_save.{model.active_adapter}.")
    own = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    # Layers that are still in the checkpoint were never the user's.
    trained = {name for name, each in model.named_parameters() if each.requires_grad and not is_stored(each)}
    if others := sorted(trained - own):
        raise ValueError(
            f"{len(others)} parameters of the base are to be trained, such as {others[0]}: freeze them, or name their "
            "modules in `modules_to_save`."
        )
    if trained and (frozen := sorted(own - trained)):
        raise ValueError(
            f"{len(frozen)} parameters of the adapter are frozen, such as {frozen[0]}: unfreeze them, or for LoRA's A "
            'use `federated_method="ffa_lora"`.'
        )


def check_stages(args: DevFTConfig, stages: Sequence[StageConfig], stack: LayerStack, capacities: Capacities) -> None:
    """Refuse stages that no groups can be made for, or that too few clients can hold.

    Raises:
        ValueError: says which.
    """
    for stage in stages:
        if (able := len(capacities.taking_part(stage.stage))) < args.clients_per_round:
            raise ValueError(
                f"stage {stage.stage} has {stage.num_layers} layers, which only {able} clients can hold by "
                f"client_max_layers={args.client_max_layers}, but a round asks {args.clients_per_round}: let more "
                "clients hold more."
            )
        if stage.num_layers < len(set(stack.kinds)):
            group_layers(GroupingTask(stack.kinds, stage.num_layers))  # raises, and says why


def check_config(args: Any) -> None:
    """Refuse another config than ours.

    Raises:
        ValueError: says which is needed.
    """
    if not isinstance(args, DevFTConfig):
        raise ValueError(f"args must be a DevFTConfig, not {type(args).__name__}: it has the options of stages, too.")


def settle_arguments(args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `Trainer` that federated rounds have no use for, and settle in `args` what DDP is asked.

    Raises:
        ValueError: says what to do instead.
    """
    check_config(args)
    if kwargs.get("optimizers", (None, None)) != (None, None):
        raise ValueError(
            "optimizers cannot be passed: each client starts a fresh one. Set `optim` and `learning_rate`, pass "
            "`optimizer_cls_and_kwargs`, or override `create_optimizer`."
        )
    if kwargs.get("model_init") is not None:
        raise ValueError("model_init is not supported: pass `model`.")
    method = make_methods(args.federated_method, args.federated_method_kwargs).method
    args.ddp_find_unused_parameters |= method.partial  # parts of the adapter take turns


def check_batch_size(asked: int, known: int) -> None:
    """Refuse a smaller batch, which `Trainer` asks for where memory has run out.

    Raises:
        RuntimeError: says what to lower.
    """
    if asked != known:
        raise RuntimeError(
            "out of memory outside of local training, whose steps `auto_find_batch_size` cuts: lower "
            "`per_device_eval_batch_size`, or train fewer layers."
        )


def prepare_run(
    model: Any, config: PeftConfig, args: DevFTConfig, clients: ClientData
) -> tuple[FederatedRun, PatchedBaseWeights | None]:
    """Make the state of a run that has not begun, on a model with its new adapter. Returns it, and the weights that
    the adapter's initialisation has changed, in the model, where it has.

    Args:
        config: of the adapter; see `adapter_config_of`.

    Raises:
        ValueError: an adapter that stages cannot carry, or stages that the model, or its clients, cannot have; a
            baseline that is no finished run.
    """
    keep_readable(model)
    patched = initialise(model, config.init_lora_weights) if moves_weights(config) else None
    state = adapter_state(model)
    if args.world_size > 1:  # each may have made its own, by other random numbers
        state = broadcast_object_list([state])[0]
        load_adapter_state(model, state)
    check_ranks(config, state)
    stack = layer_stack(model.get_base_model(), args.stack, state if chooses_layers(config) else None)
    check_alike(state, stack.names, stack.kinds)
    stages = args.resolve_stages(len(stack))
    depths = [stage.num_layers for stage in stages]
    capacities = Capacities(len(clients.rows), args.client_max_layers, depths, args.beyond_capacity)
    check_stages(args, stages, stack, capacities)
    run = FederatedRun(
        args=args,
        clients=clients,
        stages=stages,
        adapter=GlobalAdapter(config, state, stack.names, {} if patched is None else state),
        healed=HealedLayers(args.output_dir, stages, bool(args.client_max_layers), args.process_index == 0),
        capacities=capacities,
        baseline={Path(args.baseline).name: read_curve(args.baseline)} if args.baseline else {},
        accountant=make_accountant(args, planned_draws(args, stages, capacities), clients.examples),
    )
    return run, patched


def check_trainer(trainer: FederatedTrainer, initialisation: str | None) -> Setup:
    """Refuse what cannot be trained, as far as it is known before any work is spent on the adapter.

    Returns:
        What is known.

    Raises:
        ValueError: another launch than DeepSpeed's, where that was asked for; see `check_compatibility`.
    """
    args, accelerator, given = trainer.args, trainer.accelerator, trainer.calibration_dataset
    if args.deepspeed_plugin is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"DeepSpeed was asked for, but Accelerate runs {accelerator.distributed_type.value}: launch by "
            "`accelerate launch` with a config like recipes/accelerate/zero3.yaml."
        )
    check_overrides(trainer)
    devices = set((getattr(trainer.model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {len(devices)} devices by its `device_map`, but a client is trained on one: "
            "leave `device_map` out, or cut the model over processes by recipes/accelerate/zero3.yaml."
        )
    setup = Setup(
        args,
        trainer=trainer.kind,
        adapter=adapter_config_of(trainer.model, initialisation),
        base=trainer.model.get_base_model(),
        mixed_precision=accelerator.mixed_precision,
        mean_over_tokens=_is_mean_over_tokens(trainer),
        has_processor=trainer.processing_class is not None,
        has_evaluation=trainer.eval_dataset is not None,
        server_rows=False if given is None else given,
        network=trainer.remote_clients is not None,
    )
    check_compatibility(setup)
    if args.device.type == "cpu" and args.process_index == 0:
        advise_float32(accelerator.mixed_precision, setup.base.dtype)
    return setup


def _is_mean_over_tokens(trainer: FederatedTrainer) -> bool:
    """Whether the loss of a part of a batch is scaled by the tokens of the whole, as far as one can know."""
    if trainer.loss_is_scaled_for_ga is not None:  # an own `compute_loss` says so
        return trainer.loss_is_scaled_for_ga
    if trainer.kind == "devft" and is_overridden(trainer, "compute_loss"):
        return False
    return bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)


def check_run(trainer: FederatedTrainer, run: FederatedRun, setup: Setup) -> None:
    """Refuse what cannot be trained, now that the adapter and the stages are known, too.

    Raises:
        ValueError: see `check_compatibility`; options of the method that do not fit the adapter; rows without lengths
            that are asked for.
    """
    state = run.adapter.state
    shapes = tuple(tensor.shape for tensor in state.values())
    layout = AdapterLayout(tuple(state), shapes, lora_scaling(run.adapter.config))
    setup = replace(setup, layout=layout, state=state, num_stages=len(run.stages))
    check_compatibility(setup)
    if trainer.args.train_sampling_strategy == "group_by_length" and trainer.remote_clients is None:
        lengths_of(trainer.train_dataset, trainer.args.length_column_name)  # raises, and says why
    federation = build_federation(trainer, accountant=run.accountant)
    federation.method.begin_stage(layout, torch.zeros(sum(layout.sizes)))  # raises, and says why
    check_compatibility(replace(setup, remembers=bool(federation.memory.state_dict())))
