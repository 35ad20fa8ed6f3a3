"""FLOPs of a model by formula: what a position costs in training, and in a forward pass."""

from collections.abc import Iterable, Sequence

import torch


def flops_per_token(
    model: torch.nn.Module, skipped: Iterable[torch.nn.Module] = (), encoders: Sequence[torch.nn.Module] = ()
) -> tuple[float, ...]:
    """Count the FLOPs of training on one position of each stack of layers: 4 per frozen and 6 per trainable matrix
    weight.

    Two for the forward pass and two for the gradient of the input; two more for a weight's own gradient (Kaplan
    et al. 2020, arXiv 2001.08361, §2.1, without the weight gradients that LoRA does not take). Attention scores,
    norms and the embedding's look-up are left out, a tied head is counted.

    Args:
        skipped: modules that the token does not go through.
        encoders: modules with positions of their own.

    Returns:
        Those of each of `encoders`, then those of all other weights.
    """
    out = {id(weight) for module in skipped for weight in module.parameters()}
    flops = []
    embeddings = _embeddings(model)
    if embeddings is not None and not (
        model.get_output_embeddings() is not None and getattr(model.config, "tie_word_embeddings", False)
    ):
        out.add(id(embeddings))
    for module in (*encoders, model):
        weights = [weight for weight in module.parameters() if id(weight) not in out]
        if module is not model:
            weights = [weight for weight in weights if weight is not embeddings]
        out |= set(map(id, weights))
        matrices = [(weight, shape) for weight in weights if len(shape := _shape(weight)) > 1]
        flops.append(float(sum((6 if weight.requires_grad else 4) * shape.numel() for weight, shape in matrices)))
    return tuple(flops)


def forward_flops(model: torch.nn.Module) -> float:
    """Count the FLOPs of one position without gradients: half of what frozen weights take in training."""
    return sum(flops_per_token(model)) / 2


def _embeddings(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The weight of its table of tokens, where it has one."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # audio
        return None


def _shape(weight: torch.Tensor) -> torch.Size:
    state = getattr(weight, "quant_state", None)  # 4-bit weights are packed, those of ZeRO-3 cut
    return getattr(weight, "ds_shape", weight.shape) if state is None else state.shape
