"""How an adapter lies in one flat vector."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import LoraConfig, PeftConfig, PeftModel


State = dict[str, torch.Tensor]

# The two factors of a LoRA module, by what their names hold: on linear layers, and on embeddings.
A, B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
# In the name of DoRA's norms of weights.
MAGNITUDE = "lora_magnitude_vector"
# Ends the name of a dense matrix that is added to a module's weight.
RESIDUAL = ".residual"


@dataclass(frozen=True)
class LoraPair:
    """The tensors of one LoRA module, whose product is `scaling * B @ A`.

    Attributes:
        module: what their names have in common.
        a, b: their places in a layout.
    """

    module: str
    a: int
    b: int


@dataclass(frozen=True)
class AdapterLayout:
    """The tensors of an adapter, one after the other in a flat vector.

    Attributes:
        keys: their PEFT keys; shapes: their shapes.
        scaling: the factor of the product BA.
    """

    keys: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    scaling: float = 1.0

    @classmethod
    def of(cls, model: PeftModel) -> "AdapterLayout":
        """The trainable parameters of a model, in the order of `model.named_parameters()`."""
        named = trainable(model)
        # PEFT's keys do not say that a module is a trained copy, nor which adapter's.
        adapter = rf"(\.modules_to_save)?\.{re.escape(model.active_adapter)}(?=\.|$)"
        keys = tuple(re.sub(adapter, "", name).replace(f"{MAGNITUDE}.weight", MAGNITUDE) for name in named)
        shapes = tuple(parameter.shape for parameter in named.values())
        return cls(keys, shapes, lora_scaling(model.peft_config[model.active_adapter]))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    def count(self, places: Iterable[int]) -> int:
        """How many values the tensors at `places` have together."""
        return sum(self.sizes[place] for place in places)

    @cached_property
    def all(self) -> tuple[int, ...]:
        """The places of all tensors."""
        return tuple(range(len(self)))

    def named(self, parts: Sequence[str]) -> tuple[int, ...]:
        """The places of the tensors whose key holds one of `parts`."""
        return tuple(index for index in self.all if any(part in self.keys[index] for part in parts))

    @cached_property
    def layers(self) -> tuple[int | None, ...]:
        """The layer that each tensor belongs to; None outside of the stack."""
        found = (re.search(r"\.(\d+)\.", key) for key in self.keys)
        return tuple(int(match[1]) if match else None for match in found)

    @cached_property
    def pairs(self) -> tuple[LoraPair, ...]:
        """The LoRA modules."""
        places = {key: index for index, key in enumerate(self.keys)}
        return tuple(
            LoraPair(key.partition(".lora_")[0], index, places[_other_factor(key)])
            for key, index in places.items()
            if any(part in key for part in A)
        )

    @cached_property
    def others(self) -> tuple[int, ...]:
        """The places of tensors of no LoRA module, such as those of a head that is trained whole."""
        paired = {place for pair in self.pairs for place in (pair.a, pair.b)}
        return tuple(place for place in self.all if place not in paired)

    def without(self, parts: Sequence[str]) -> tuple[int, ...]:
        """The places of the tensors whose key holds none of `parts`."""
        return tuple(index for index in self.all if not any(part in self.keys[index] for part in parts))

    def cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` as views in the tensors' shapes."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def pick(self, flat: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """The tensors at `places` of `flat`, as a vector of their own; `flat` itself where those are all."""
        if len(places) == len(self):
            return flat
        parts = flat.split(self.sizes)
        return torch.cat([parts[index] for index in places]) if places else flat[:0]

    def put(self, flat: torch.Tensor, places: Sequence[int], values: torch.Tensor, alpha: float | None = None) -> None:
        """Write `values` (see `pick`) into `flat`, in place; with `alpha`, add `alpha` times them."""
        if len(places) == len(self):
            targets, sources = [flat], [values]
        else:
            parts = flat.split(self.sizes)
            targets = [parts[index] for index in places]
            sources = values.split([self.sizes[index] for index in places])
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source) if alpha is None else target.add_(source, alpha=alpha)

    def state(self, flat: torch.Tensor, places: Sequence[int] | None = None) -> State:
        """`flat`, or its tensors at `places`, as a PEFT state dict, copied to the CPU."""
        parts = self.cut(flat)
        return {
            self.keys[index]: parts[index].to("cpu", copy=True) for index in (self.all if places is None else places)
        }

    def flat(self, state: State) -> torch.Tensor:
        """The vector of a PEFT state dict."""
        return torch.cat([state[key].flatten() for key in self.keys])


def _other_factor(key: str) -> str:
    """The key of B by that of A."""
    module, _, factor = key.rpartition(".lora_")
    return f"{module}.lora_{factor.replace('A', 'B', 1)}"


def lora_scaling(config: PeftConfig) -> float:
    """The factor of BA; 1 where the adapter is not LoRA."""
    if not isinstance(config, LoraConfig):
        return 1.0
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def uneven_options(config: LoraConfig) -> list[str]:
    """Those that are set of the options by which an adapter is not LoRA of one rank and scale everywhere."""
    options = ("rank_pattern", "alpha_pattern", "use_dora", "target_parameters")
    return [option for option in options if getattr(config, option)]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
