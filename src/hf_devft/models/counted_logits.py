"""A decoder's loss with logits only where a label counts, and never those of many tokens at a time.

A prompt's and a padding's logits are thrown away by the loss, and those of a batch are often the largest thing in
memory: rows x tokens x vocabulary. Hooks on the model leave its own forward pass as it is, up to the hidden states.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hf_devft.tasks.data import IGNORED


# Tokens x vocabulary that are held at a time: 256 MiB in float32; fewer read the output embeddings more often
# (our choice, by measurement).
_PIECE = 2**26

# Options of a model's config by which its loss has another part.
_MORE_LOSSES = ("output_router_logits", "z_loss_coefficient")

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


@runtime_checkable
class LossByRows(Protocol):
    """A model's loss function where it is the sum of another's, of parts of a batch's rows."""

    function: Callable[..., torch.Tensor]

    def row_weights(self, counts: torch.Tensor) -> torch.Tensor:
        """Return what the losses of a row's tokens are multiplied with: rows.

        Args:
            counts: whether a token's label counts, rows x (length - 1).
        """

    def note(self, row_losses: torch.Tensor) -> None:
        """Take note of the losses of the rows, multiplied."""


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


def memory_of_loss(base: PreTrainedModel, tokens: int, half: bool) -> tuple[int, int]:
    """Return the bytes that a training step's loss keeps, and those that it takes for a moment, where all of a batch's
    tokens count: hidden states and their gradient; a piece's logits.

    Args:
        half: whether logits are computed in half precision; then there are their float32 and half a gradient, too.
    """
    piece, size = min(tokens, _tokens_a_piece(base)), 8 if half else 4
    size += 2 * size if getattr(base.config, "final_logit_softcapping", None) else 0  # before and within tanh
    return 4 * 2 * tokens * base.config.hidden_size, size * piece * base.config.vocab_size


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
        and not any(getattr(base.config, name, 0) for name in _MORE_LOSSES)
        and "loss_function" in inspect.unwrap(type(base).forward).__code__.co_names  # Bart's has a loss of its own
        and base.get_output_embeddings() is not None
        and isinstance(base.get_decoder(), PreTrainedModel)  # some call their head so
        and base.get_decoder() is not base
    )


class _CountedTokens:
    """The tokens of a batch whose labels count.

    Args:
        labels: rows x (length - 1), of each token the next one.
    """

    def __init__(self, labels: torch.Tensor):
        self.labels = labels
        self.places = (labels != IGNORED).nonzero(as_tuple=True)  # rows, and places in them
        self.targets = labels[self.places]

    def to(self, device: torch.device) -> None:
        """Move them to where the hidden states are."""
        self.labels, self.targets = self.labels.to(device), self.targets.to(device)
        self.places = tuple(place.to(device) for place in self.places)


class _CountedLogits:
    """The hooks of one model, and what they pass on within one forward pass."""

    def __init__(self, base: PreTrainedModel, is_active: Callable[[], bool]):
        self.base, self.is_active = base, is_active
        self.counted: _CountedTokens | None = None
        self.decoded: ModelOutput | None = None

    def before(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Ask for no logits. Finds which labels count before the forward pass: a GPU is waited for until it knows."""
        self.counted = None  # of a pass that has failed
        labels = kwargs.get("labels")
        if (
            labels is None
            or kwargs.get("shift_labels") is not None
            or not self._knows(base.loss_function)
            or not self.is_active()
        ):
            return None
        self.counted = _CountedTokens(labels[:, 1:])
        none = torch.empty(0, dtype=torch.long, device=labels.device)
        return args, kwargs | {"labels": None, "logits_to_keep": none}

    def _knows(self, loss_function: Callable) -> bool:
        if isinstance(loss_function, LossByRows):
            return loss_function.function is ForCausalLMLoss and not self._trains_head
        return loss_function is ForCausalLMLoss

    @property
    def _trains_head(self) -> bool:
        """Whether anything between the decoder and the logits is trained."""
        return any(parameter.requires_grad for module in self._beside for parameter in module.parameters())

    @cached_property
    def _beside(self) -> list[nn.Module]:
        """The modules beside the decoder, which are few: they are asked in every pass."""
        return _beside(self.base, self.base.get_decoder())

    def after_decoder(self, decoder: nn.Module, args: tuple, output: ModelOutput) -> None:
        """Keep the hidden states."""
        if self.counted is not None:
            self.decoded = output

    def after(self, base: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: ModelOutput) -> Any:
        """Compute the loss of the hidden states."""
        if self.counted is None:
            return None
        counted, decoded = self.counted, self.decoded
        self.counted = self.decoded = None
        hidden = decoded.last_hidden_state[:, :-1]
        counted.to(hidden.device)
        chosen, tail = hidden[counted.places], partial(self._tail, decoded)
        if isinstance(base.loss_function, LossByRows):
            return CausalLMOutputWithPast(loss=self._loss_by_rows(tail, chosen, counted))
        divisor = kwargs.get("num_items_in_batch")
        divisor = len(counted.targets) if divisor is None else torch.as_tensor(divisor, device=hidden.device)
        if not base.training:
            predicted, nll = (
                counted.labels.new_zeros(counted.labels.shape, dtype=t) for t in (torch.long, torch.float32)
            )
            predicted[counted.places], nll[counted.places] = self._scores(tail, chosen, counted.targets)
            return ScoredTokens(loss=nll.sum() / divisor, predicted=predicted, nll=nll)
        return CausalLMOutputWithPast(loss=self._loss(tail, chosen, counted.targets) / divisor)

    def _loss(self, tail: Tail, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the tokens' losses; in pieces, where gradients go to the hidden states alone."""
        if self._trains_head:
            return nn.functional.cross_entropy(tail(hidden).float(), targets, reduction="sum")
        weights = torch.ones_like(targets, dtype=torch.float32)
        return _LossInPieces.apply(hidden, targets, weights, tail, _tokens_a_piece(self.base))[0]

    def _loss_by_rows(self, tail: Tail, hidden: torch.Tensor, counted: _CountedTokens) -> torch.Tensor:
        by_rows, (row, _) = self.base.loss_function, counted.places
        weights = by_rows.row_weights(counted.labels != IGNORED)[row].float()
        loss, each = _LossInPieces.apply(hidden, counted.targets, weights, tail, _tokens_a_piece(self.base))
        by_rows.note(each.new_zeros(len(counted.labels)).index_add(0, row, each))
        return loss

    @torch.no_grad()
    def _scores(self, tail: Tail, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens, and the targets' negative log-likelihoods."""
        scores = []
        for piece, target in zip(*(each.split(_tokens_a_piece(self.base)) for each in (hidden, targets)), strict=True):
            logits = tail(piece)
            scores.append((logits.argmax(-1), _losses_into_exponentials(logits.float(), target)[0]))
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
            return type(self.base).forward(self.base, input_ids=tokens).logits.flatten(0, 1)
        finally:
            del decoder.forward
            if forward is not None:
                decoder.forward = forward


def _beside(whole: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The largest modules of a module that neither have a part of it nor lie in it."""
    if whole is part:
        return []
    if part not in whole.modules():
        return [whole]
    return [module for child in whole.children() for module in _beside(child, part)]


def _losses_into_exponentials(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens' losses, and the sums of their logits' exponentials, which take the logits' place: at this
    size, a new tensor costs more than what is computed in it.

    Args:
        logits: tokens x vocabulary, float32. targets: tokens.
    """
    own, largest = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)
    totals = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return (totals.log() + (largest - own))[:, 0], totals  # in this order, large logits lose no small loss


class _LossInPieces(torch.autograd.Function):
    """The sum of the tokens' losses, each multiplied, and each alone. Takes each piece's gradient while its logits are
    there, as the output embeddings are frozen: nothing is computed twice, and no logits are kept (as Liger's and Cut
    Cross-Entropy's kernels do it on a GPU)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, tail: Tail, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, gradient = torch.empty_like(weights), torch.empty_like(hidden)
        pieces = (tensor.split(size) for tensor in (hidden, targets, weights, losses, gradient))
        for piece, target, weight, own_losses, own_gradient in zip(*pieces, strict=True):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                logits = tail(piece)
                way_back = get_gradient_edge(logits)  # before another value is written into them
            slopes = logits.detach().float()  # in the logits' own memory where they are float32
            each, totals = _losses_into_exponentials(slopes, target)
            slopes.mul_(weight[:, None] / totals).scatter_add_(1, target[:, None], -weight[:, None])
            own_losses.copy_(weight * each)
            own_gradient.copy_(torch.autograd.grad(way_back, piece, slopes.to(logits.dtype))[0])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None
