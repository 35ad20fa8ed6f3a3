"""The model that a trainer trains or evaluates: a stage's submodel or the full model, and the base that they share."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from peft import PeftModel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_devft.models.adapter import adapter_state, detach_adapter, load_adapter_state, shared_copy
from hf_devft.models.counted_logits import count_logits
from hf_devft.models.engines import Engine, make_engine, shard
from hf_devft.models.initialisation import moves_weights
from hf_devft.models.residual import PatchedBaseWeights
from hf_devft.models.weights import is_stored
from hf_devft.stages.submodel import build_whole
from hf_devft.tasks.predictions import reduce_logits
from hf_devft.trainer.federated_run import FederatedRun
from hf_devft.trainer.interface import FederatedTrainer
from hf_devft.trainer.overrides import is_overridden


logger = logging.getLogger(__name__)


class ModelInUse:
    """Sets a trainer's `model`, `model_wrapped`, `optimizer` and those of its callbacks, together.

    Args:
        trainer: whose model is the full one with its adapter, or has layers that are still in the checkpoint.
        patched: the weights that the adapter's initialisation has changed, or None.

    Attributes:
        base: the full model without adapter, from the first `release` on.
        engine: of the model in use; None at first, and between two models.
        is_whole: whether the model in use is the full one with the full-depth adapter.
    """

    def __init__(self, trainer: FederatedTrainer, patched: PatchedBaseWeights | None):
        self._trainer, self._patched = trainer, patched
        self._leaves_logits_out = False
        self.base: PreTrainedModel | None = None
        self.engine: Engine | None = None
        # DeepSpeed evaluates by an engine of its own, and would keep it.
        self.is_whole = not (trainer.is_deepspeed_enabled or any(map(is_stored, trainer.model.parameters())))

    def build_engine(self, model: PeftModel, train: bool = True) -> Engine:
        """Build an engine for a model, with the trainer's optimiser where it is to be trained; the model in use
        stays."""
        trainer = self._trainer
        before = trainer.model, trainer.optimizer
        trainer.prepare_model_in_use(model)
        hooks = self.count_logits(model.get_base_model(), lambda: self._leaves_logits_out)
        self._freeze_inputs(model.get_base_model())
        trainer.model, trainer.optimizer = model, None  # which the optimiser is made for
        try:
            return make_engine(
                trainer.accelerator,
                model,
                self._make_optimizer if train else None,
                trainer.args.learning_rate,
                skip_ddp=trainer.args.client_placement == "client_parallel",
                hooks=hooks,
            )
        finally:
            trainer.model, trainer.optimizer = before

    def _make_optimizer(self) -> Optimizer:
        made = self._trainer.create_optimizer()
        return self._trainer.optimizer if made is None else made  # an own one may only set it, as `Trainer` allows

    def _freeze_inputs(self, base: PreTrainedModel) -> None:
        """Undo that the embeddings' output requires a gradient, as transformers and PEFT set it for activation
        checkpointing. Only its reentrant kind needs that; otherwise all layers below the adapter would be kept,
        computed again and gone back through, for nothing."""
        if not (self._trainer.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            base.disable_input_require_grads()

    def count_logits(self, base: PreTrainedModel, is_active: Callable[[], bool]) -> list[RemovableHandle]:
        """Have a model leave out the logits that the loss does not need, while `is_active`, where the loss is the
        usual one; returns the hooks."""
        return [] if self.computes_all_logits else count_logits(base, is_active)

    @property
    def computes_all_logits(self) -> bool:
        """Whether the loss is not the usual one, or something is in the way of leaving logits out."""
        trainer = self._trainer
        return bool(
            is_overridden(trainer, "compute_loss")
            or is_overridden(trainer, "training_step")
            or trainer.compute_loss_func
            or trainer.label_smoother
            or trainer.args.torch_compile
            or is_deepspeed_zero3_enabled()  # the output embeddings are there for one call of the whole model
        )

    def evaluating(self, prediction_loss_only: bool | None) -> AbstractContextManager:
        """Return the context of an evaluation: all logits are computed for what `predict` returns, and for metrics of
        one's own."""
        trainer = self._trainer
        loss_only = prediction_loss_only or trainer.args.prediction_loss_only
        reduced = trainer.preprocess_logits_for_metrics is reduce_logits
        if (loss_only or reduced) and not is_overridden(trainer, "prediction_step"):
            return self.leaving_logits_out()
        return nullcontext()

    @contextmanager
    def leaving_logits_out(self) -> Iterator[None]:
        """Within this context, models leave out the logits that the loss does not need."""
        before, self._leaves_logits_out = self._leaves_logits_out, True
        try:
            yield
        finally:
            self._leaves_logits_out = before

    def use(self, engine: Engine) -> None:
        """Make an engine's model the one that is trained and evaluated."""
        trainer, self.engine = self._trainer, engine
        trainer.model, trainer.model_wrapped, trainer.optimizer = engine.peft_model, engine.model, engine.optimizer
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed = trainer.model_wrapped
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))

    @contextmanager
    def using(self, engine: Engine) -> Iterator[None]:
        """Within this context, an engine's model is the one in use; what was before is afterwards."""
        before = self.engine
        assert before is not None  # a stage is being trained
        self.use(engine)
        try:
            yield
        finally:
            self.use(before)

    def release(self) -> PreTrainedModel:
        """Close the engine in use, and make the base the trainer's model for the moment; the first time, take the
        adapter off it, and under ZeRO-3 cut it over the processes."""
        trainer = self._trainer
        if self.engine is not None:
            self.engine.close()
        self.is_whole = False
        if self.base is None:
            if self._patched is not None:
                self._patched.close()
            given = trainer.given_model is not None  # and stays whole
            self.base = detach_adapter(shared_copy(trainer.model) if given else trainer.model)
            self._freeze_inputs(self.base)  # submodels would have it, too
            shard(trainer.accelerator, trainer.args, self.base)
        self.engine = trainer.optimizer = trainer.callback_handler.optimizer = None
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = self.base
        return self.base

    def use_whole(self, run: FederatedRun) -> None:
        """Make the full model, with a run's full-depth adapter, the one that is evaluated, unless it is."""
        if self.is_whole:
            return
        if self.base is None:  # whoever has the trainer may have changed the adapter
            run.adapter = replace(run.adapter, state=adapter_state(self._trainer.model))
        model = run.adapter.attach(build_whole(self.release(), run.args.stack), run.residual)
        self.use(self.build_engine(model, train=False))
        self.is_whole = True

    def hand_back(self, run: FederatedRun) -> None:
        """Put what was trained into the adapter of the model that was passed, where that had one."""
        given = self._trainer.given_model
        if given is None or given is self._trainer.model:
            return
        if run.residual or moves_weights(run.adapter.config):  # another base's, which was changed with the adapter
            logger.warning("the model that was passed is as it was: what was trained is `trainer.model`.")
        else:
            load_adapter_state(given, run.adapter.state)
