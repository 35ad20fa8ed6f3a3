"""Whether a round's clients are trained in one batch: a question to the trainer, its options and the model."""

import logging

from peft import PeftModel
from transformers import Trainer

from hf_devft.federation.clients.batched import obstacle_of_model
from hf_devft.trainer.overrides import is_overridden


logger = logging.getLogger(__name__)

# Optimisers that treat each value by itself, so that values of several clients can lie in one tensor.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
# What a subclass of `Trainer` may override, and what then sees one client's model and batch at a time.
HOOKS = (
    "compute_loss", "training_step", "create_optimizer", "get_optimizer_cls_and_kwargs", "_prepare_inputs",
    "_clip_grad_norm",
)  # fmt: skip


def overridden_hooks(trainer: Trainer) -> list[str]:
    """Those of `HOOKS` that a trainer has of its own."""
    return [name for name in HOOKS if is_overridden(trainer, name)]


def obstacle_of_trainer(trainer: Trainer) -> str | None:
    """Why clients cannot share a batch of this trainer's, whatever the model; or None."""
    args, own = trainer.args, overridden_hooks(trainer)
    reasons = {
        f"{type(trainer).__name__} has its own {', '.join(own)}": own,
        "the loss is the trainer's, not the model's": trainer.compute_loss_func or trainer.label_smoother,
        f"optim={args.optim.value!r} or `optimizer_cls_and_kwargs` may mix values": args.optim.value not in ELEMENTWISE
        or trainer.optimizer_cls_and_kwargs is not None,
        "steps are cut to save memory (`gradient_accumulation_steps`, `auto_find_batch_size`)": (
            args.gradient_accumulation_steps > 1 or args.auto_find_batch_size
        ),
        "fp16 scales the losses of all by one factor": trainer.accelerator.scaler is not None,
        "processes train each client together": trainer.is_deepspeed_enabled
        or (args.client_placement == "data_parallel" and args.world_size > 1),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class ClientBatching:
    """Decides how many clients share a batch, and says why they do not, where something else was asked for.

    Args:
        trainer: whose hooks the clients are trained by.
        most: how many clients of a round this process trains.
        method_obstacle: why the method needs each client's gradients, or None.

    Attributes:
        enabled: whether clients may share a batch from here on.
    """

    def __init__(self, trainer: Trainer, most: int, method_obstacle: str | None):
        self._trainer, self._most, self._method_obstacle = trainer, most, method_obstacle
        self.enabled = True

    def count(self, model: PeftModel) -> int:
        """Return how many clients train `model` in one batch, at most; disables batching, where it is not possible."""
        args = self._trainer.args
        asked = args.clients_per_batch or (self._most if args.device.type != "cpu" else 1)
        if not self.enabled or min(asked, self._most) <= 1:  # none, where a round has fewer clients than processes
            return 1
        reason = self._method_obstacle or obstacle_of_trainer(self._trainer) or obstacle_of_model(model)
        if reason is None:
            return min(asked, self._most)
        self.disable(reason)
        return 1

    def disable(self, reason: str) -> None:
        """Train one client after another from here on; a warning, where a number was asked for."""
        self.enabled = False
        if self._trainer.is_world_process_zero():
            asked = self._trainer.args.clients_per_batch
            level = logging.INFO if asked is None else logging.WARNING
            logger.log(level, f"clients_per_batch={asked}: clients are trained one after another, as {reason}.")
