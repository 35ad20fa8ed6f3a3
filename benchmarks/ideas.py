"""Rules that were tried for the stages and are no options of the package, each in a few lines on top of it.

    python benchmarks/ideas.py --seeds 0 1 2 --workers 2

The quickstart's task and clients, 4 layers for 12 rounds and 16 for 4, the rates those of `to_target.py`. Writes
`results/ideas.jsonl` and `.md`; a run that is already there is not repeated.
"""

import copy
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from recipe_runs import COLUMNS, RECIPE, arguments, publish_runs, run_all, table
from to_target import DISTILLED, LINEAR
from transformers import PreTrainedModel

from hf_devft import DevFTConfig, StageConfig
from hf_devft.federation.methods.lora import truncated_product
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.layout import State, lora_scaling
from hf_devft.models.weights import dense
from hf_devft.stages import GROUPINGS
from hf_devft.stages.global_adapter import GlobalAdapter
from hf_devft.stages.grouping import GroupingTask, Groups, group_layers
from hf_devft.trainer.session import TrainingSession
from hf_devft.trainer.stage_factory import StageFactory
from hf_devft.trainer.stage_runner import StageRunner


RATES = [*LINEAR, "--stage_learning_rates", "6e-3", "9e-3"]
STAGES = ["--stage_layers", "4", "16", "--stage_rounds", "12", "4"]
TAUGHT = [*DISTILLED, "512"]
EVALUATED = ["--eval_strategy", "epoch", "--eval_on_start", "false", "--save_strategy", "no"]


def alternate(whose: str) -> None:
    """Each of a group's members in turn stands for it, from client to client or from round to round."""
    train_model = StageRunner.train_model

    def alternating(self, learning_rate, turn, engine, layers):
        base, groups = self.hooks.models.base, self.stage.groups
        take_weights(base, groups, layers, turn.client if whose == "client" else turn.round_index)
        trained = train_model(self, learning_rate, turn, engine, layers)
        take_weights(base, groups, layers, 0)
        return trained

    StageRunner.train_model = alternating


def take_weights(base: PreTrainedModel, groups: Groups, layers: list[torch.nn.Module], number: int) -> None:
    """Give a submodel's layers the weights of the `number`th member of their groups."""
    stack = find_layer_stack(base)
    for layer, group in zip(layers, groups, strict=True):
        own = dict(stack.layers[group[number % len(group)]].named_parameters())
        for name, parameter in layer.named_parameters():
            if (value := own.get(name.replace(".base_layer", ""))) is not None:
                parameter.data = dense(value).detach().to(parameter)


def protected(first: int, last: int) -> Callable[[GroupingTask], Groups]:
    """A rule: so many layers at both ends stand for themselves, in stages that have room for a group between them."""

    def rule(task: GroupingTask) -> Groups:
        depth, between = len(task.kinds), task.capacity - first - last
        middle = range(first, depth - last)
        similarity = task.similarity()[first : depth - last, first : depth - last]
        inner = GROUPINGS["normalized_cut"](GroupingTask([0] * len(middle), between, task.seed, lambda: similarity))
        ends = [[layer] for layer in (*range(first), *range(depth - last, depth))]
        return sorted([*ends, *([middle[index] for index in group] for group in inner)])

    return rule


GROUPINGS["last_protected"], GROUPINGS["ends_protected"] = protected(0, 1), protected(1, 1)


def group_by_function() -> None:
    """Similarity of what the layers add to the residual stream on calibration texts, for that of their weights."""

    def group(self: StageFactory, record: StageConfig, adapter: State) -> Groups:
        batches = self.teacher.batches_of(self.teacher.rows, self.args.eval_batch_size, None)
        similarity = similarity_of_what_is_added(self.builder.whole().eval(), batches)
        kinds = self.builder.stack.kinds
        task = GroupingTask(kinds, record.num_layers, self.args.seed, lambda: similarity)
        return group_layers(task, record.grouping)

    StageFactory.group = group
    DevFTConfig.asks_server_texts = property(lambda self: True)


@torch.no_grad()
def similarity_of_what_is_added(model: PreTrainedModel, batches: Iterable[dict]) -> torch.Tensor:
    layers, added = find_layer_stack(model).layers, {}

    def note(layer, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        added[layer] = (output[0] if isinstance(output, tuple) else output) - before

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    grams = []
    for inputs in batches:
        model(**inputs)
        rows = torch.stack([added[layer][inputs["attention_mask"].bool()] for layer in layers])
        rows = torch.nn.functional.normalize(rows.float(), dim=-1)
        grams.append(torch.einsum("ith,jth->ij", rows, rows) / rows.shape[1])
    for hook in hooks:
        hook.remove()
    return torch.stack(grams).mean(0)


def narrow(rank: int) -> None:
    """From the second stage on, the best approximation of the adapter's product by one of a lower rank; the smaller
    submodel teaches with what it has."""
    enter, submodel_of, wide = TrainingSession.enter, StageFactory.submodel_of, {}

    def narrowing(self, record, checkpoint):
        if record.stage > 1:
            wide["adapter"] = self.run.adapter
            self.run.adapter = narrowed(self.run.adapter, rank)
        return enter(self, record, checkpoint)

    TrainingSession.enter = narrowing
    StageFactory.submodel_of = lambda self, earlier, adapter: submodel_of(self, earlier, wide["adapter"])


def narrowed(adapter: GlobalAdapter, rank: int) -> GlobalAdapter:
    """The best approximation of an adapter by one of a lower rank."""
    config = copy.deepcopy(adapter.config)
    config.r = rank
    ratio, state = lora_scaling(adapter.config) / lora_scaling(config), {}
    for key in (key for key in adapter.state if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        u, s, v = truncated_product(adapter.state[other].double(), adapter.state[key].double(), rank)
        root = (ratio * s).sqrt()
        state |= {key: (root[:, None] * v).float(), other: (u * root).float()}
    return replace(adapter, config=config, state=state)


# Name -> (what it changes of the package, further flags).
IDEAS: dict[str, tuple[Callable[[], None] | None, list[str]]] = {
    "as it is": (None, []),
    "a group's members in turn, client by client": (lambda: alternate("client"), []),
    "a group's members in turn, round by round": (lambda: alternate("round"), []),
    "the last layer protected": (None, ["--grouping", "last_protected"]),
    "the first and the last layer protected": (None, ["--grouping", "ends_protected"]),
    "groups by what layers add to the residual stream": (group_by_function, []),
    "rank 2": (None, ["--lora_r", "2", "--lora_alpha", "8"]),
    "20 local steps, half the rounds": (None, ["--local_steps", "20", "--stage_rounds", "6", "2"]),
    "distilled, 60 steps on 512 prompts": (None, TAUGHT),
    "distilled, rank 8, then 2": (lambda: narrow(2), TAUGHT),
    "distilled, rank 8, then 1": (lambda: narrow(1), TAUGHT),
}


def try_out(name: str, flags: list[str]) -> None:
    """The recipe, with an idea put into the package first."""
    change, _ = IDEAS[name]
    if change is not None:
        change()
    sys.argv = [str(RECIPE), *flags]
    runpy.run_path(str(RECIPE), run_name="__main__")


def main() -> None:
    options = arguments("ideas", __doc__)
    runs = {name: ("quickstart.yaml", [*EVALUATED, *STAGES, *RATES, *flags]) for name, (_, flags) in IDEAS.items()}
    results = run_all(runs, options, script=lambda name: [__file__, name])
    early = {
        "after stage 1, submodel": (lambda run: run["stages"][0]["metrics"]["eval_loss"], "{:.3f}"),
        "at full depth": (lambda run: run["stages"][0]["metrics"]["eval_full_loss"], "{:.3f}"),
    }
    publish_runs(options, results, table(results, early | COLUMNS))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in IDEAS:
        try_out(sys.argv[1], sys.argv[2:])
    else:
        main()
