"""A larger submodel is taught what a smaller one has learned: knowledge distillation, where the layers grow."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_devft.models.layer_stack import watch_lengths


# Positions whose probabilities are in memory at a time.
_CHUNK = 1024


def divergence(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over positions of KL(teacher || student) in nats (Hinton et al. 2015, arXiv 1503.02531, §2, temperature 1).

    Beside the logits, only a part's probabilities are held at a time; the backward pass computes them again.

    Args:
        teacher, student: logits, of any shape; classes in the last dimension.
        mask: the positions that count, where it has their shape; else all count.
    """
    if mask is None or mask.shape != teacher.shape[:-1]:
        mask = torch.ones(teacher.shape[:-1], device=teacher.device)
    parts = (logits.flatten(0, -2).split(_CHUNK) for logits in (teacher, student))
    sums = [
        checkpoint(_weighted_divergence, *part, use_reentrant=False)
        for part in zip(*parts, mask.flatten().split(_CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() / mask.sum()


def _weighted_divergence(teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    wanted, given = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mul(weights).sum()


def distil(
    teacher: PreTrainedModel | PeftModel,
    student: PreTrainedModel | PeftModel,
    batches: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Train what is trainable of `student`, an adapter, say, to answer as `teacher` does, without any labels.

    AdamW without weight decay, the gradient's norm clipped to 1, the rate falling to 0 in a line (our choice: there is
    one way to end at, not many clients' to find a mean of). A step takes the memory of a client's, and the teacher's
    logits.

    Args:
        teacher, student: models whose outputs have `logits`; only what is trainable of `student` changes.
        batches: what they read, `steps` of them.
        autocast: () -> the context of a forward pass.

    Returns:
        The positions that went through each of the two.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    teacher.eval(), student.train()
    lengths, watching = watch_lengths(student.get_base_model() if isinstance(student, PeftModel) else student)
    positions = 0
    for inputs in batches:
        with autocast():
            with torch.no_grad():
                target = teacher(**inputs).logits
            loss = divergence(target, student(**inputs).logits, inputs.get("attention_mask"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        positions += len(target) * sum(lengths)
    for watch in watching:
        watch.remove()
    return positions
