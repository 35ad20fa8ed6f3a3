"""The submodels of one base: which layers share a group, and the model that the groups make."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_devft.models.layer_stack import LayerStack, find_layer_stack
from hf_devft.models.layout import State
from hf_devft.stages.grouping import GroupingTask, Groups, adapter_gram, group_layers, similarity_of, weight_gram
from hf_devft.stages.submodel import build_submodel, build_whole, layers_of
from hf_devft.stages.transfer import kinds_by_adapter, layers_with_adapter


class SubmodelBuilder:
    """Groups the layers of a base, and makes submodels of the groups.

    Args:
        base: the full model, without adapter; stays as it is.
        which: see `find_layer_stack`.
        adapter: a full-depth adapter that is not on all layers, whose layers then share no group with the others.
    """

    def __init__(self, base: PreTrainedModel, which: str | None = None, adapter: State | None = None):
        self.base, self.which = base, which
        self.stack = layer_stack(base, which, adapter)

    @cached_property
    def _weight_gram(self) -> torch.Tensor:
        return weight_gram(self.stack)

    def similarity(self, adapter: State) -> torch.Tensor:
        """Compute the cosines between layers with their parameters of a full-depth adapter: L x L; see
        `similarity_of`."""
        return similarity_of(self._weight_gram + adapter_gram(self.stack, adapter))

    def group(
        self,
        rule: str,
        capacity: int,
        seed: int,
        adapter: State,
        losses_without: Callable[[list[int], list[int]], list[float]] | None = None,
        bridge_errors: Callable[[], torch.Tensor] | None = None,
    ) -> Groups:
        """Group the layers into `capacity` groups by a rule of `GROUPINGS`; see `GroupingTask`.

        Args:
            adapter: the full-depth adapter, as it is when the stage begins.
        """
        similarity = cache(lambda: self.similarity(adapter))  # asked once for each kind of layers
        task = GroupingTask(self.stack.kinds, capacity, seed, similarity, losses_without, bridge_errors)
        return group_layers(task, rule)

    def build(self, groups: Groups, fusion: str, beta: float) -> PreTrainedModel:
        """Make the submodel of these groups; see `build_submodel`."""
        return build_submodel(self.base, self.stack, groups, fusion, beta)

    def whole(self) -> PreTrainedModel:
        """Make the full model, with what is still in the base's checkpoint read."""
        return build_whole(self.base, self.which)

    def layers_of(self, submodel: PreTrainedModel, groups: Groups) -> list[nn.Module]:
        """The layers of a submodel of these groups."""
        return layers_of(submodel, self.stack, groups)


def layer_stack(base: PreTrainedModel, which: str | None, adapter: State | None) -> LayerStack:
    """Find the stack that stages shorten; with an `adapter`, layers that have one share no group with the others."""
    stack = find_layer_stack(base, which)
    if adapter is None:
        return stack
    return replace(stack, kinds=kinds_by_adapter(stack.kinds, layers_with_adapter(adapter, stack.names)))
