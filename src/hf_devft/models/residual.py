"""Residuals: what a method adds to the base's weights beside an adapter, as a dense matrix for each module."""

import copy
import math

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from hf_devft.models.layout import RESIDUAL, State, lora_scaling, uneven_options


def product_adapter(config: PeftConfig, state: State, residual: State) -> tuple[PeftConfig, State]:
    """Make one adapter, for plain PEFT, that does what an adapter and a residual do together.

    Its rank is that of the adapter, which keeps its place in front, and of the residual, exactly (by SVD; singular
    values below the precision of float32 are left out). Everything is as it was where there is no residual.
    """
    if not residual:
        return config, state
    factors = {key.removesuffix(RESIDUAL): torch.linalg.svd(matrix.double(), full_matrices=False)
               for key, matrix in residual.items()}  # fmt: skip
    rank = max(_rank(u, s, v) for u, s, v in factors.values())
    widened = copy.deepcopy(config)
    widened.r = config.r + rank
    widened.lora_alpha = lora_scaling(config) * (math.sqrt(widened.r) if config.use_rslora else widened.r)
    product = dict(state)
    for module, (u, s, v) in factors.items():
        root = (s / lora_scaling(config)).sqrt()
        a, b = (f"{module}.lora_{factor}.weight" for factor in "AB")
        right = _first(root[:, None] * v, rank, 0).to(state[a])
        left = _first(u * root, rank, 1).to(state[b])
        product[a], product[b] = torch.cat([state[a], right]), torch.cat([state[b], left], dim=1)
    return widened, product


def without_residual(product: State, config: PeftConfig) -> State:
    """Cut the adapter of `config` out of what `product_adapter` has made."""
    if not isinstance(config, LoraConfig) or uneven_options(config):  # nothing is added beside those
        return product
    rank = config.r
    front = {".lora_A.": slice(rank), ".lora_B.": (slice(None), slice(rank))}  # embeddings have no residual
    return {
        key: tensor[next((part for name, part in front.items() if name in key), ...)]
        for key, tensor in product.items()
    }


def _rank(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> int:
    return int((s > s[0] * torch.finfo(torch.float32).eps * max(u.shape[0], v.shape[1])).sum())


def _first(matrix: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """The first `count` rows or columns, zeros where there are fewer."""
    matrix = matrix.narrow(dim, 0, min(count, matrix.shape[dim]))
    missing = count - matrix.shape[dim]
    return nn.functional.pad(matrix, (0, 0, 0, missing) if dim == 0 else (0, missing))


class PatchedBaseWeights:
    """Copies of the weights under a model's LoRA modules, in their place, so that a residual can be added to them and
    to no other model's.

    Args:
        model: base with adapter; changed in place.

    Raises:
        ValueError: weights that nothing can be added to: of an embedding, quantised, or cut over processes.
    """

    def __init__(self, model: PeftModel):
        self._open = {}
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            base = module.get_base_layer()
            if not isinstance(getattr(base, "weight", None), nn.Parameter) or not base.weight.is_floating_point():
                raise ValueError(f"{name} has weights that nothing can be added to: use a base that is not quantised.")
            if not len(module.lora_A):
                raise ValueError(f"{name} is an embedding, to which no residual can be added: leave it out.")
            original, base.weight = base.weight, nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            self._open[name + RESIDUAL] = (base, original, getattr(module, "fan_in_fan_out", False))

    @torch.no_grad()
    def set(self, residual: State) -> None:
        """Make the weights the original ones plus the residual."""
        for key, matrix in residual.items():
            base, original, transposed = self._open[key]
            matrix = (matrix.T if transposed else matrix).to(base.weight.device)
            base.weight.copy_(original.to(base.weight.device) + matrix)

    def close(self) -> None:
        """Give the modules their own weights back."""
        for base, original, _ in self._open.values():
            base.weight = original
