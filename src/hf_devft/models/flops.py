"""FLOPs of a model by formula: what a position costs in training, and in a forward pass."""

import operator
from collections.abc import Iterable

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import PretrainedConfig, PreTrainedModel

from hf_devft.models.layer_stack import encoders_of, find_layer_stack


def flops_per_token(
    model: torch.nn.Module,
    skipped: Iterable[torch.nn.Module] = (),
    is_reference: bool = False,
) -> tuple[float, ...]:
    """Count the FLOPs of training on one position of each stack of layers: 4 per frozen and 6 per trainable matrix
    weight, 2 in layers below all that is trained; where the model is its own reference, 2 more per frozen one.

    Two for the forward pass and two for the gradient of the input; two more for a weight's own gradient (Kaplan
    et al. 2020, arXiv 2001.08361, §2.1, without the weight gradients that LoRA does not take). Attention scores,
    norms and the embedding's look-up are left out, a tied head is counted, and so are, in a mixture, as many experts
    as a position goes through.

    Args:
        skipped: modules that the token does not go through.
        is_reference: whether each position goes through the model without its adapter, too, as DPO's do.

    Returns:
        Those of each encoder with positions of its own, see `encoders_of`, then those of all other weights.
    """
    base = _base_of(model)
    encoders = [] if base is None else encoders_of(base)
    out = {id(weight) for module in skipped for weight in module.parameters()}
    below = {id(weight) for layer in _layers_below(model) for weight in layer.parameters()}
    flops = []
    chosen = chosen_experts(model)
    embeddings = _embeddings(model)
    out |= _idle(model)
    for module in (*encoders, model):
        weights = [weight for weight in module.parameters() if id(weight) not in out]
        if module is not model:
            weights = [weight for weight in weights if weight is not embeddings]
        out |= set(map(id, weights))
        matrices = [(weight, shape) for weight in weights if len(shape := _shape(weight)) > 1]
        frozen = 2 * is_reference
        per_weight = [
            2 + frozen if id(weight) in below else 6 if weight.requires_grad else 4 + frozen for weight, _ in matrices
        ]
        used = (shape.numel() * (chosen.get(shape[0], 1.0) if len(shape) > 2 else 1.0) for _, shape in matrices)
        flops.append(float(sum(map(operator.mul, per_weight, used))))
    return tuple(flops)


def forward_flops(model: torch.nn.Module) -> float:
    """Count the FLOPs of one position without gradients: half of what frozen weights take in training."""
    return sum(flops_per_token(model)) / 2


def _layers_below(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model's one stack that no gradient goes through, as all that is trained is above them."""
    if (base := _base_of(model)) is None:
        return []
    stack = find_layer_stack(base)
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in stack.layers]
    embeddings = _embeddings(base)
    if len(stack.names.lists) > 1 or True not in trained or (embeddings is not None and embeddings.requires_grad):
        return []
    return stack.layers[: trained.index(True)]


def _base_of(model: torch.nn.Module) -> PreTrainedModel | None:
    """The model without its adapter's wrapper, where it is one of transformers'."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base if isinstance(base, PreTrainedModel) else None


def _idle(model: torch.nn.Module) -> set[int]:
    """The weights that no position is multiplied with: tables of embeddings that are not the head as well, and those
    of modules in whose place a copy is trained (`modules_to_save`)."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    idle = {id(weight) for wrapper in wrappers for weight in wrapper.original_module.parameters()}
    idle |= {id(weight) for name, weight in model.named_parameters() if "lora_embedding_A" in name}
    if (embeddings := _embeddings(model)) is None:
        return idle
    head = model.get_output_embeddings()
    is_apart = any(module in wrappers for module in (head, model.get_input_embeddings()))
    if head is None or is_apart or not getattr(model.config, "tie_word_embeddings", False):
        idle.add(id(embeddings))
    return idle - {id(getattr(head, "weight", None))}


def _embeddings(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The weight of its table of tokens, where it has one."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # audio
        return None


def chosen_experts(model: torch.nn.Module) -> dict[int, float]:
    """{number of a mixture's experts, which are the first of three dimensions: the part of them that a position goes
    through}."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = filter(None, (getattr(config, name, None) for name in names))
    per_token = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    return {
        number: next((used for name in per_token if (used := getattr(config, name, None))), number) / number
        for number in experts
    }


def _shape(weight: torch.Tensor) -> torch.Size:
    state = getattr(weight, "quant_state", None)  # 4-bit weights are packed, those of ZeRO-3 cut
    return getattr(weight, "ds_shape", weight.shape) if state is None else state.shape
