"""Several clients' local training in one forward and backward pass, their adapters stacked along a client axis.

The base's weights, which the clients share, are read once for all of them. Losses, clipping and the optimiser's state
are each client's own, so that it ends with the adapter that it would have alone, but for the rounding of sums that are
computed in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_devft.federation.clients.hooks import TrainingHooks
from hf_devft.federation.clients.local_training import count_padding, count_seen, next_step
from hf_devft.federation.turns import LocalResult
from hf_devft.models.adapter import shared_copy
from hf_devft.models.engines import Engine
from hf_devft.models.layout import AdapterLayout
from hf_devft.tasks.data import IGNORED


# What a batch must and may have, so that rows and tokens can be added that take no part in anything.
NEEDED = {"input_ids", "attention_mask", "labels"}
KNOWN = NEEDED | {"token_type_ids"}
# Rotary embeddings whose frequencies depend on the longest row of a batch.
ROPE_BY_BATCH = ("dynamic", "longrope")


class CannotStackError(ValueError):
    """The model does something with a batch's rows that would mix clients."""


@dataclass
class ClientAxis:
    """The clients that share a batch, whose rows are theirs in turn, the same number each; and their model's loss
    function. It is also a `LossByRows`.

    Attributes:
        function: the loss function of one client's model.
        clients: how many they are; rows: of the batch.
        items: what each one's loss is divided by (`num_items_in_batch`), None where the model takes a mean.
        losses: theirs, after a forward pass.
    """

    function: Callable[..., torch.Tensor]
    clients: int = 0
    rows: int = 0
    items: list = field(default_factory=list)
    losses: torch.Tensor | None = None

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        """The sum of the clients' losses, each by the function on its own rows."""
        losses = []
        for client in range(self.clients):
            own = partial(self._rows_of, client)
            given = {name: own(value) for name, value in kwargs.items()}
            if self.items[client] is not None and "num_items_in_batch" in given:
                given["num_items_in_batch"] = self.items[client]
            losses.append(self.function(*map(own, args), **given))
        each = torch.stack(losses)
        self.losses = each.detach()
        return each.sum()

    def row_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """See `LossByRows`."""
        own = counts.sum(1).view(self.clients, -1).sum(1)
        divisors = [count if items is None else items for count, items in zip(own, self.items, strict=True)]
        each = torch.stack([1 / torch.as_tensor(divisor, device=counts.device) for divisor in divisors])
        return each.repeat_interleave(self.rows // self.clients)

    def note(self, row_losses: torch.Tensor) -> None:
        """See `LossByRows`."""
        self.losses = row_losses.view(self.clients, -1).sum(1)

    def _rows_of(self, client: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if value.shape[0] != self.rows:
            raise CannotStackError(f"the loss is given {tuple(value.shape)} for a batch of {self.rows} rows")
        return value.chunk(self.clients)[client]


class ClientLinear(nn.Module):
    """A linear layer without bias for each client: weight K × out × in, of which the first `axis.clients` are used."""

    def __init__(self, linear: nn.Linear, count: int, axis: ClientAxis):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().expand(count, -1, -1).clone())
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """rows × length × in -> rows × length × out."""
        if x.dim() < 3 or x.shape[0] != self.axis.rows:
            raise CannotStackError(
                f"an adapted layer is given {tuple(x.shape)} for a batch of {self.axis.rows} rows: it is not known "
                "which client is whose"
            )
        weight = self.weight[: self.axis.clients]
        return torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)


def stack_clients(model: PeftModel, count: int) -> tuple[PeftModel, ClientAxis]:
    """A second model that shares the base's tensors with `model` and has the adapters of `count` clients."""
    stacked = shared_copy(model)
    base = stacked.get_base_model()
    base.loss_function = axis = ClientAxis(base.loss_function)
    for module in stacked.modules():
        if isinstance(module, LoraLayer):
            for factors in (module.lora_A, module.lora_B):
                for name, linear in factors.items():
                    factors[name] = ClientLinear(linear, count, axis)
    return stacked, axis


def obstacle_of_model(model: PeftModel) -> str | None:
    """Why clients cannot share a batch of this model's, or None."""
    base: PreTrainedModel = model.get_base_model()
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    linear = {
        id(factor.weight)
        for module in adapted
        for factors in (module.lora_A, module.lora_B)
        for factor in factors.values()
        if isinstance(factor, nn.Linear) and factor.bias is None
    }
    dropout = any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
    reasons = {
        "the model has no `loss_function`": not hasattr(base, "loss_function"),
        f"its rotary embeddings depend on a batch's longest row ({', '.join(ROPE_BY_BATCH)})": _has_rope_by_batch(
            base.config.to_dict()
        ),
        "the model has an encoder and a decoder": base.config.is_encoder_decoder,
        "the base is in 8 bits": getattr(base, "is_loaded_in_8bit", False),
        "there is dropout, whose draws would differ": dropout,
        "the adapter is not on linear layers alone": any(
            parameter.requires_grad and id(parameter) not in linear for parameter in model.parameters()
        )
        or any(isinstance(module, ParamWrapper) or module.lora_variant for module in adapted),
        "modules have a `forward` of their own": any("forward" in vars(module) for module in model.modules()),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_rope_by_batch(config: Any) -> bool:
    if not isinstance(config, dict):
        return False
    kinds = (config.get("rope_type"), config.get("type"))
    return any(kind in ROPE_BY_BATCH for kind in kinds) or any(map(_has_rope_by_batch, config.values()))


def stack_flat(layout: AdapterLayout, vectors: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Adapters in `layout` as the flat vector of a model for `count` clients; what is left over is 0."""
    matrix = vectors[0].new_zeros(count, vectors[0].numel())
    torch.stack(list(vectors), out=matrix[: len(vectors)])
    return torch.cat([part.flatten() for part in matrix.split(layout.sizes, dim=1)])


def unstack_flat(layout: AdapterLayout, flat: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `stack_flat`: count × values."""
    sizes = [count * size for size in layout.sizes]
    return torch.cat([part.view(count, -1) for part in flat.split(sizes)], dim=1)


def join_batches(batches: Sequence[dict[str, torch.Tensor]], padding: dict[str, int]) -> dict[str, torch.Tensor]:
    """One batch of all clients' rows: the same number of rows for each, of the same length.

    Rows are made longer on the right, with what `padding` says (0 by default), and more by copies of a client's first
    one without labels; neither takes part in a loss.

    Raises:
        CannotStackError: batches of another form (see `NEEDED` and `KNOWN`).
    """
    if any(set(batch) != set(batches[0]) for batch in batches) or not all(map(_is_joinable, batches)):
        raise CannotStackError(
            f"the batches cannot be joined: they must have {', '.join(sorted(NEEDED))}, tensors of a row per example, "
            "and nothing else but token_type_ids"
        )
    rows, joined = max(len(batch["labels"]) for batch in batches), {}
    for name in batches[0]:
        tensors = [batch[name] for batch in batches]
        length = max(tensor.shape[-1] for tensor in tensors) if tensors[0].dim() == 2 else 0
        tensors = [_padded(tensor, rows, length, padding.get(name, 0), name == "labels") for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _is_joinable(batch: Any) -> bool:
    if not NEEDED <= set(batch) <= KNOWN or not all(isinstance(tensor, torch.Tensor) for tensor in batch.values()):
        return False
    if batch["labels"].is_floating_point():
        return False
    return all(tensor.dim() in (1, 2) and len(tensor) == len(batch["labels"]) for tensor in batch.values())


def _padded(tensor: torch.Tensor, rows: int, length: int, value: int, labels: bool) -> torch.Tensor:
    if tensor.dim() == 2 and tensor.shape[1] < length:
        tensor = nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)
    if (missing := rows - len(tensor)) > 0:
        more = tensor[:1].expand(missing, *tensor.shape[1:])
        tensor = torch.cat([tensor, torch.full_like(more, IGNORED) if labels else more])
    return tensor


@torch.no_grad()
def clip_each(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip each client's gradient as `torch.nn.utils.clip_grad_norm_` does; returns the norms before, K."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
    norms = torch.linalg.vector_norm(norms, dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
    return norms


def train_together(
    hooks: TrainingHooks, engine: Engine, axis: ClientAxis, batches: Sequence[Iterator[Any]], pad_token: int
) -> list[LocalResult]:
    """`LocalTraining` of as many clients as `batches`, on a model of `stack_clients`, whose optimiser must be fresh.

    Args:
        pad_token: what inputs are made longer with.

    Raises:
        CannotStackError: see there.
    """
    args, model, count, norms = hooks.args, engine.model, len(batches), None
    hooks.current_gradient_accumulation_steps = 1
    total, positions, seen = torch.zeros(count, device=args.device), [0] * count, [0] * count
    padding: list[torch.Tensor | int] = [0] * count
    fillers = {"labels": IGNORED, getattr(model, "main_input_name", "input_ids"): pad_token}
    for step in range(args.local_steps):
        samples = [next_step(hooks, own, 1) for own in batches]
        inputs = join_batches([micro_batches[0] for micro_batches, *_ in samples], fillers)
        axis.clients, axis.rows = count, len(inputs["labels"])
        axis.items, axis.losses = [items for _, items, _ in samples], None
        random = _random_state(args.device) if step == 0 else None
        # The axis puts each client's own divisor in the place of the first's.
        with engine.gradient_sync(last=True), hooks.leaving_logits_out():
            loss = hooks.training_step(model, inputs, axis.items[0])
        if random is not None:
            _check_step(axis, loss, torch.equal(random, _random_state(args.device)))
        total += axis.losses + torch.stack([torch.as_tensor(unknown, device=args.device) for *_, unknown in samples])
        if args.max_grad_norm > 0:
            norms = clip_each(engine.parameters, args.max_grad_norm)
        engine.optimizer.step()
        engine.zero_grad()
        for client, (micro_batches, *_) in enumerate(samples):
            positions[client] += micro_batches[0]["input_ids"].numel()
            padding[client] = padding[client] + count_padding(micro_batches[0])
            seen[client] += count_seen(args.include_num_input_tokens_seen, model, micro_batches[0])
    own_norms = [None] * count if norms is None else list(norms[:count])
    return [
        LocalResult(loss, (passed,), padded, counted, norm)
        for loss, passed, padded, counted, norm in zip(
            total / args.local_steps, positions, padding, seen, own_norms, strict=True
        )
    ]


def _check_step(axis: ClientAxis, loss: torch.Tensor, repeatable: bool) -> None:
    if axis.losses is None:
        raise CannotStackError("the model computes its loss without `loss_function`")
    if not repeatable:
        raise CannotStackError("the model draws random numbers (dropout), which would differ")
    if axis.losses.isfinite().all() and not torch.allclose(loss.float(), axis.losses.float().sum(), rtol=1e-3):
        raise CannotStackError("the model's loss is more than its `loss_function` gives for each client")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
