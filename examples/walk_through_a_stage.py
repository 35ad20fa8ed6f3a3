"""One stage by hand: which layers are alike, which share a group, what the submodel is. Draws groups.png.

python examples/walk_through_a_stage.py        # or with the name of any causal language model

# %% marks cells, for editors that know them.
"""

# %% The base, and its stack of layers
import sys

from matplotlib.figure import Figure

from hf_devft.embedded import resolve_model_name
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.streaming import load_base
from hf_devft.stages.grouping import GroupingTask, group_layers, similarity_of, weight_gram
from hf_devft.stages.submodel import build_submodel


base = load_base(resolve_model_name(sys.argv[1] if len(sys.argv) > 1 else "embedded"))
stack = find_layer_stack(base)
print(f"{len(stack)} layers in {', '.join(stack.names.lists)}")

# %% How alike they are: the cosine of their weights (§3.2 of the paper)
similarity = similarity_of(weight_gram(stack))

# %% Groups of layers that conflict least
capacity = max(2, len(stack) // 4)
groups = group_layers(GroupingTask(stack.kinds, capacity, seed=0, similarity=lambda: similarity), "deconfliction")
for number, group in enumerate(groups):
    print(f"group {number}: layers {group}")

# %% Both in one picture
figure = Figure(figsize=(6, 5), layout="constrained")
axes = figure.add_subplot()
figure.colorbar(axes.imshow(similarity, vmin=0, vmax=1), label="cosine of the weights")
of_layer = {layer: number for number, group in enumerate(groups) for layer in group}
axes.set(xlabel="layer", ylabel="layer (its group)", title=f"{len(stack)} layers in {capacity} groups")
axes.set_yticks(range(len(stack)), [f"{layer} ({of_layer[layer]})" for layer in range(len(stack))], fontsize="x-small")
figure.savefig("groups.png", dpi=110)

# %% The submodel: one representative layer a group, all else shared with the base
submodel = build_submodel(base, stack, groups, fusion="differential", beta=0.1)
print(f"a submodel of {submodel.config.num_hidden_layers} layers, {submodel.num_parameters():,} parameters")
