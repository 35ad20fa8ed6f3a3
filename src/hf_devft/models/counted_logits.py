"""A decoder's loss with logits only where a label counts, and never those of many tokens at a time.

A prompt's and a padding's logits are thrown away by the loss, and those of a batch are often the largest thing in
memory: rows x tokens x vocabulary. Hooks on the model leave its own forward pass as it is, up to the hidden states.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hf_devft.tasks.metrics import IGNORED


# Tokens x vocabulary that are held at a time: 128 MiB in float32, three times that with probabilities and gradient
# (our choice).
_PIECE = 2**25

Tail = Callable[[torch.Tensor], torch.Tensor]  # hidden states, tokens x hidden size -> logits


@dataclass
class ScoredTokens(ModelOutput):
    """What an evaluation needs of a batch.

    Attributes:
        loss: of the batch.
        predicted: the likeliest token after each but the last, rows x (length - 1), 0 where no label counts.
        nll: the label's negative log-likelihood there, 0 where none counts.
    """

    loss: torch.Tensor | None = None
    predicted: torch.Tensor | None = None
    nll: torch.Tensor | None = None


def count_logits(base: PreTrainedModel, is_active: Callable[[], bool] = lambda: True) -> list[RemovableHandle]:
    """Make a decoder compute its logits only where labels count, when it is given labels: its output has the loss,
    and no logits; in evaluation mode, it is `ScoredTokens`.

    Args:
        base: the model, without its adapter's wrapper.
        is_active: asked in every forward pass; where it says no, there are all logits.

    Returns:
        The hooks, to remove in the end; none where the model is no decoder of transformers' usual form, and computes
        all logits as before.
    """
    if not counts_logits(base):
        return []
    counted = _CountedLogits(base, is_active)
    return [
        base.get_decoder().register_forward_hook(counted.after_decoder),
        base.register_forward_pre_hook(counted.before, with_kwargs=True),
        base.register_forward_hook(counted.after, with_kwargs=True),
    ]


def memory_of_loss(base: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Return the bytes that a training step's loss keeps, and those that it takes for a moment, in float32, where all
    of a batch's tokens count: hidden states and their gradient; a piece's logits, probabilities and gradient."""
    piece = min(tokens, _tokens_a_piece(base))
    return 4 * 2 * tokens * base.config.hidden_size, 4 * 3 * piece * base.config.vocab_size


def _tokens_a_piece(base: PreTrainedModel) -> int:
    return max(1, _PIECE // base.config.vocab_size)


def counts_logits(base: PreTrainedModel) -> bool:
    """Whether a model is a decoder of transformers' usual form, which can leave logits out."""
    parameters = inspect.signature(type(base).forward).parameters
    return (
        isinstance(base, PreTrainedModel)
        and {"logits_to_keep", "labels"} <= parameters.keys()
        and not base.config.is_encoder_decoder
        and base.config.get_text_config() is base.config  # no images between the tokens
        and not getattr(base.config, "output_router_logits", False)  # whose loss has another part
        and base.get_output_embeddings() is not None
        and base.get_decoder() is not base
    )


class _CountedLogits:
    """The hooks of one model, and what they pass on within one forward pass."""

    def __init__(self, base: PreTrainedModel, is_active: Callable[[], bool]):
        self.base, self.is_active = base, is_active
        self.labels: torch.Tensor | None = None
        self.decoded: ModelOutput | None = None

    def before(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Ask for the logits of the last token alone."""
        self.labels = None  # of a pass that has failed
        if (
            kwargs.get("labels") is None
            or kwargs.get("shift_labels") is not None
            or base.loss_function is not ForCausalLMLoss
            or not self.is_active()
        ):
            return None
        self.labels = kwargs["labels"]
        return args, kwargs | {"labels": None, "logits_to_keep": 1}

    def after_decoder(self, decoder: nn.Module, args: tuple, output: ModelOutput) -> None:
        """Keep the hidden states."""
        if self.labels is not None:
            self.decoded = output

    def after(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: ModelOutput) -> Any:
        """Compute the loss of the hidden states."""
        if self.labels is None:
            return None
        labels, decoded = self.labels, self.decoded
        self.labels = self.decoded = None
        hidden = decoded.last_hidden_state[:, :-1]
        targets = labels[:, 1:].to(hidden.device)
        counts = targets != IGNORED
        chosen, tail = hidden[counts], partial(self._tail, decoded)
        divisor = kwargs.get("num_items_in_batch")
        divisor = counts.sum() if divisor is None else torch.as_tensor(divisor, device=hidden.device)
        if not base.training:
            predicted, nll = (torch.zeros_like(targets, dtype=dtype) for dtype in (torch.long, torch.float32))
            predicted[counts], nll[counts] = self._scores(tail, chosen, targets[counts])
            return ScoredTokens(loss=nll.sum() / divisor, predicted=predicted, nll=nll)
        return CausalLMOutputWithPast(loss=self._loss(tail, chosen, targets[counts]) / divisor)

    def _loss(self, tail: Tail, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the tokens' losses; in pieces, where gradients go to the hidden states alone."""
        if any(parameter.requires_grad for parameter in self.base.get_output_embeddings().parameters()):
            return _cross_entropy(tail(hidden), targets, "sum")
        return _LossInPieces.apply(hidden, targets, tail, _tokens_a_piece(self.base))

    def _scores(self, tail: Tail, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens, and the targets' negative log-likelihoods."""
        scores = []
        for piece, target in zip(*(each.split(_tokens_a_piece(self.base)) for each in (hidden, targets)), strict=True):
            logits = tail(piece)
            scores.append((logits.argmax(-1), _cross_entropy(logits, target, "none")))
        predicted, nll = zip(*scores, strict=True)
        return torch.cat(predicted), torch.cat(nll)

    def _tail(self, decoded: ModelOutput, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own way from hidden states to logits: its forward pass, without the decoder's."""
        output, decoder = copy.copy(decoded), self.base.get_decoder()
        output["last_hidden_state"] = hidden[None]
        forward = vars(decoder).get("forward")
        decoder.forward = lambda *args, **kwargs: output
        try:
            tokens = torch.zeros(hidden[None].shape[:2], dtype=torch.long, device=hidden.device)
            return type(self.base).forward(self.base, input_ids=tokens).logits[0]
        finally:
            del decoder.forward
            if forward is not None:
                decoder.forward = forward


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction=reduction)


class _LossInPieces(torch.autograd.Function):
    """Takes each piece's gradient while its logits are there, as the output embeddings are frozen: nothing is computed
    twice, and no logits are kept (as Liger's and Cut Cross-Entropy's kernels do it on a GPU)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, tail: Tail, size: int) -> torch.Tensor:
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for piece, target, own in zip(*(each.split(size) for each in (hidden, targets, gradient)), strict=True):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                loss = _cross_entropy(tail(piece), target, "sum")
            own.copy_(torch.autograd.grad(loss, piece)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None
