"""A model with an adapter on Accelerate's processes: by itself, with DDP or with DeepSpeed. Built once a stage, not
once a client."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from hf_devft.models.layer_stack import watch_lengths
from hf_devft.models.layout import AdapterLayout, trainable
from hf_devft.models.weights import is_sharded


class Engine:
    """A model, wrapped for training and evaluation, whose adapter goes in and out as one flat vector.

    Args:
        accelerator: where it runs.
        model: base with adapter.
        make_optimizer: makes the optimiser, of what is trainable of `model`; None where it is only evaluated.
        learning_rate: that the optimiser is made with.
        skip_ddp: each process trains the model for itself.
        hooks: on the base, to remove in the end.

    Attributes:
        model: what the forward pass goes through; peft_model: `model` as it was given.
        optimizer: the stage's, or None.
        parameters: the adapter's; layout: how they lie in a vector.
        adapter: a module of just these, for what goes over all that a module has.
        flops_per_token: {(tensors trained, layers skipped): of training on a position}, as far as it is known.
        lengths: of the sequences that went through each stack of layers last.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        make_optimizer: Callable[[], torch.optim.Optimizer] | None,
        learning_rate: float,
        skip_ddp: bool,
        hooks: Iterable[RemovableHandle] = (),
    ):
        self.accelerator = accelerator
        self.peft_model = model
        self.learning_rate = learning_rate
        self.parameters = list(trainable(model).values())
        self.adapter = nn.ParameterList(self.parameters)
        self.flops_per_token: dict[tuple, tuple[float, ...]] = {}
        self.layout = AdapterLayout.of(model)
        self.lengths, watches = watch_lengths(model.get_base_model())
        self._hooks = [*hooks, *watches]
        self.optimizer = None
        self.prepare(model, make_optimizer, skip_ddp)
        self._base_rates: list[float] = (
            [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []
        )

    def prepare(
        self, model: PeftModel, make_optimizer: Callable[[], torch.optim.Optimizer] | None, skip_ddp: bool
    ) -> None:
        """Put the model on its device, wrap it, make the optimiser."""
        model.to(self.accelerator.device)
        # All trainable parameters become views of one vector, so that entering a client is one copy.
        self._flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        for parameter, view in zip(self.parameters, self.layout.cut(self._flat), strict=True):
            parameter.data = view
        alone = make_optimizer is None or skip_ddp
        self.model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=alone)
        if make_optimizer is not None:
            self.optimizer = self.accelerator.prepare_optimizer(make_optimizer())
            self._blank_optimizer = copy.deepcopy(self.optimizer.state_dict())
            self._blank_scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()

    def read(self) -> torch.Tensor:
        """Return the adapter as it is, flat; the next `write` may reuse its memory."""
        return self._flat

    def write(self, flat: torch.Tensor) -> None:
        """Copy `flat` into the adapter."""
        self._flat.copy_(flat)

    def begin_client(self, flat: torch.Tensor, learning_rate: float, trains: Sequence[int] | None = None) -> None:
        """Begin a client's training, from the adapter `flat`, with the optimiser as it was made. Nothing stays of a
        client before that failed in a step.

        Args:
            learning_rate: of this round; parameter groups of other rates keep their ratio.
            trains: the places of the tensors that it trains; all by default.
        """
        self.write(flat)
        self.choose(self.layout.all if trains is None else trains)
        self.zero_grad()
        self.reset_optimizer()
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * learning_rate / self.learning_rate

    def choose(self, trains: Sequence[int]) -> None:
        """Train the tensors at these places only."""
        chosen = set(trains)
        for place, parameter in enumerate(self.parameters):
            parameter.requires_grad_(place in chosen)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.adapter.zero_grad()

    def reset_optimizer(self) -> None:
        """Make the optimiser as it was when it was made, and its loss scale, too."""
        self.optimizer.load_state_dict(copy.deepcopy(self._blank_optimizer))  # some would write into it
        if self._blank_scaler is not None:
            self.accelerator.scaler.load_state_dict(self._blank_scaler)
            self.accelerator.scaler._per_optimizer_states.clear()  # of a step that was not finished

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """For a backward pass: processes add their gradients up in the `last` one of a step."""
        self.accelerator.gradient_state._set_sync_gradients(last)  # as `Trainer` does
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def loss_scale(self) -> float:
        """Return the factor of losses and gradients in mixed precision."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def close(self) -> None:
        """Give up the model and everything that was built for it, with the memory that it took."""
        for hook in self._hooks:
            hook.remove()
        self.model = self.peft_model = self.optimizer = self._flat = None
        self.parameters = self.adapter = self.layout = None
        self.accelerator.free_memory()


class DeepSpeedEngine(Engine):
    """On DeepSpeed with ZeRO-1, 2 or 3, by its public accessors of partitioned parameters (`deepspeed.utils`)."""

    def prepare(
        self, model: PeftModel, make_optimizer: Callable[[], torch.optim.Optimizer] | None, skip_ddp: bool
    ) -> None:
        plugin = self.accelerator.state.deepspeed_plugin
        self._sharded = plugin.zero_stage == 3
        if make_optimizer is not None:
            self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer())
        elif self._sharded:
            self.model = self.accelerator.prepare(model)
        else:  # every process holds all of the model, in the type that training has cast the base to
            model = model.to(plugin.hf_ds_config.dtype())
            self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self._blank_scale = copy.copy(self._zero.loss_scaler) if self.optimizer is not None else None

    @property
    def _zero(self):
        return self.model.optimizer

    def read(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        with self._accessible():
            return torch.cat([safe_get_full_fp32_param(parameter).flatten() for parameter in self.parameters])

    def write(self, flat: torch.Tensor) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param

        values = list(zip(self.parameters, self.layout.cut(flat), strict=True))
        # What the forward pass reads, then the optimiser's own copy in single precision.
        with torch.no_grad(), zero.GatheredParameters(self.parameters, 0, enabled=self._sharded):
            for parameter, value in values:
                parameter.data.copy_(value)
        with self._accessible():
            for parameter, value in values:
                safe_set_full_fp32_param(parameter, value)

    @contextmanager
    def _accessible(self) -> Iterator[None]:
        """DeepSpeed's accessors leave out what is not trained at the moment."""
        frozen = [parameter for parameter in self.parameters if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def zero_grad(self) -> None:
        self.model.zero_grad()  # it has buffers of its own

    def reset_optimizer(self) -> None:
        self._zero.optimizer.state.clear()
        self._zero.loss_scaler = copy.copy(self._blank_scale)

    def loss_scale(self) -> float:
        return self._zero.loss_scaler.cur_scale

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        self.accelerator.gradient_state._set_sync_gradients(last)
        return nullcontext()  # the engine counts for itself

    def close(self) -> None:
        if self._sharded:
            _forget_sharded(self.model.module)
        super().close()


def _forget_sharded(module: nn.Module) -> None:
    """Delete what keeps a ZeRO-3 engine alive in DeepSpeed 0.19: a global list, by parameters that outlive it, and by
    a cache whose keys hold the modules."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not module]
    for parameter in module.parameters():
        vars(parameter).pop("_z3_optimizer", None)
    coordinator = vars(partitioned_param_coordinator.PartitionedParameterCoordinator)
    for method in coordinator.values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def shard(accelerator: Accelerator, args: TrainingArguments, base: nn.Module) -> None:
    """Cut the base over the processes under ZeRO-3, unless that was done while it was loaded.

    Left to the first stage's engine, every parameter that stages share would keep that engine.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed, and torch warns at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    plugin.hf_ds_config.trainer_config_finalize(args, base, num_training_steps=1)  # fills in what is "auto"
    if plugin.zero_stage == 3 and not all(map(is_sharded, base.parameters())):
        from deepspeed import init_distributed, zero

        init_distributed(auto_mpi_discovery=False)  # takes over what torch has set up
        zero.Init(module=base, config_dict_or_path=plugin.deepspeed_config)


def make_engine(
    accelerator: Accelerator,
    model: PeftModel,
    make_optimizer: Callable[[], torch.optim.Optimizer] | None,
    learning_rate: float,
    skip_ddp: bool,
    hooks: Iterable[RemovableHandle],
) -> Engine:
    """Make the engine that the launch asks for; see `Engine`."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return (DeepSpeedEngine if deepspeed else Engine)(
        accelerator, model, make_optimizer, learning_rate, skip_ddp, hooks
    )  # fmt: skip
