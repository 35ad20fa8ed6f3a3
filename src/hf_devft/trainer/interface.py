"""What the parts of a trainer ask of it: the public side of `DevFTMixin`, mixed into a `transformers.Trainer`."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.client_side import Exchange
from hf_devft.federation.clients.hooks import TrainingHooks
from hf_devft.federation.partition import ClientData
from hf_devft.federation.rounds import Federation
from hf_devft.federation.sampling import Placement
from hf_devft.hub.publisher import RunPublisher


class ClientLink(Protocol):
    """Carries messages between a run and its clients, wherever they are."""

    def begin_run(self, run: Any, federation: Federation, processor: Any) -> None:
        """Begin a run, or go on with one (a `FederatedRun`); `processor` reads the server's rows."""
        ...

    def begin_stage(self, active: Any, rounds: range) -> None:
        """Begin a stage (an `ActiveStage`), or go on with it; `rounds` are those to come."""
        ...

    def may_go_back_to(self, folders: Iterable[Path]) -> None:
        """Have clients keep what they had at these checkpoints."""
        ...

    def end_stage(self) -> None:
        """End a stage."""
        ...

    def exchange(self, learning_rate: float) -> Exchange:
        """Return what carries messages to the clients and back, in a round with this learning rate."""
        ...


class FederatedTrainer(TrainingHooks, Protocol):
    """A trainer of federated rounds.

    Attributes:
        args, model, model_wrapped, optimizer, lr_scheduler, deepspeed, state, control, callback_handler, accelerator,
        train_dataset, eval_dataset, processing_class, compute_metrics, preprocess_logits_for_metrics,
        compute_loss_func, label_smoother, model_accepts_loss_kwargs, loss_is_scaled_for_ga, is_deepspeed_enabled:
            those of `Trainer`.
        kind: "devft", "sft" or "dpo".
        clients: who has which rows of `train_dataset`.
        calibration_dataset: the server's own rows, or None.
        placement: this process's share of the work.
        remote_clients: the way to clients on other machines; None where they are trained here.
        given_model: what was passed, where it had an adapter.
        publisher: pushes to the Hub; None where nothing is pushed, and on other processes than the main one.
    """

    args: DevFTConfig
    model: PeftModel | PreTrainedModel
    model_wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    deepspeed: Any
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    accelerator: Accelerator
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    processing_class: Any
    compute_metrics: Callable | None
    preprocess_logits_for_metrics: Callable | None
    compute_loss_func: Callable | None
    label_smoother: Any
    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga: bool | None
    is_deepspeed_enabled: bool
    kind: str
    clients: ClientData
    calibration_dataset: Dataset | None
    placement: Placement
    remote_clients: ClientLink | None
    given_model: PeftModel | None
    publisher: RunPublisher | None

    def create_optimizer(self) -> torch.optim.Optimizer:
        """See `Trainer.create_optimizer`."""
        ...

    def create_scheduler(self, num_training_steps: int, **kwargs: Any) -> Any:
        """See `Trainer.create_scheduler`."""
        ...

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        """See `Trainer.compute_loss`."""
        ...

    def get_eval_dataloader(self, eval_dataset: Dataset) -> DataLoader:
        """See `Trainer.get_eval_dataloader`."""
        ...

    def evaluation_loop(self, dataloader: DataLoader, description: str, **kwargs: Any) -> Any:
        """See `Trainer.evaluation_loop`."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """See `Trainer.log`."""
        ...

    def save_model(self, output_dir: str, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`."""
        ...

    def prepare_model_in_use(self, model: PeftModel) -> None:
        """Called with every model before it is trained or evaluated."""
        ...

    def client_rows(self) -> tuple[Dataset, Callable]:
        """The clients' rows in columns that the collator takes, and the collator."""
        ...

    def server_batches(self, rows: Dataset, size: int, sampler: Sampler | None = None) -> Iterator[dict[str, Any]]:
        """Batches of the server's own rows, on the device."""
        ...
