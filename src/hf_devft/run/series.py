"""What trackers (TensorBoard, trackio, Weights & Biases) are told beside what is logged."""

from collections.abc import Callable, Mapping

from transformers import TrainerCallback


class SeriesCallback(TrainerCallback):
    """Gives each stage and each client a series of its own, which trackers show as `train/stage-2/loss`,
    `eval/stage-2/loss` and `train/client-north/loss`. The log history stays as it is.

    Args:
        client_losses: () -> the losses of the last round's clients, by name.
    """

    def __init__(self, client_losses: Callable[[], Mapping[str, float]]):
        self._client_losses = client_losses

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "stage" not in logs:
            return
        stage, evaluated = f"stage-{logs['stage']}", [key for key in logs if key.startswith("eval_")]
        logs |= {f"eval_{stage}/{key.removeprefix('eval_')}": logs[key] for key in evaluated}
        if "loss" in logs:
            logs[f"{stage}/loss"] = logs["loss"]
            logs |= {f"client-{name}/loss": loss for name, loss in self._client_losses().items()}
