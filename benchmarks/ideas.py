"""Rules that were tried for the stages and are no options of the package, each in a few lines on top of it.

    python benchmarks/ideas.py --seeds 0 1 2 --workers 2

The quickstart's task and clients, 4 layers for 12 rounds and 16 for 4, the rates those of `to_target.py`. Writes
`results/ideas.jsonl` and `.md`; a run that is already there is not repeated.
"""

import copy
import runpy
import sys
from collections.abc import Callable

import torch
from recipe_runs import COLUMNS, RECIPE, arguments, publish_runs, run_all, table
from to_target import DISTILLED, LINEAR

import hf_devft
from hf_devft.federation.methods.lora import truncated_product
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.layout import lora_scaling
from hf_devft.models.weights import dense
from hf_devft.stages.grouping import GROUPINGS, GroupingTask, Groups
from hf_devft.stages.submodel import build_whole


RATES = [*LINEAR, "--stage_learning_rates", "6e-3", "9e-3"]
STAGES = ["--stage_layers", "4", "16", "--stage_rounds", "12", "4"]
TAUGHT = [*DISTILLED, "512"]
EVALUATED = ["--eval_strategy", "epoch", "--eval_on_start", "false", "--save_strategy", "no"]


def alternate(whose: str) -> None:
    """Each of a group's members in turn stands for it, from client to client or from round to round."""

    class Alternating(hf_devft.DevFTTrainer):
        def _train_submodel(self, learning_rate, turn, layers):
            number = turn.client if whose == "client" else self.state.global_step
            self._take_weights(layers, number)
            trained = super()._train_submodel(learning_rate, turn, layers)
            self._take_weights(layers, 0)
            return trained

        def _take_weights(self, layers, number: int) -> None:
            for layer, group in zip(layers, self._running.stage.groups, strict=True):
                own = dict(self._running.stack.layers[group[number % len(group)]].named_parameters())
                for name, parameter in layer.named_parameters():
                    if (value := own.get(name.replace(".base_layer", ""))) is not None:
                        parameter.data = dense(value).detach().to(parameter)

    hf_devft.DevFTTrainer = Alternating


def protect(first: int, last: int) -> None:
    """So many layers at both ends stand for themselves, in stages that have room for a group between them."""
    rule = GROUPINGS["deconfliction"]

    def protected(task: GroupingTask) -> Groups:
        depth, between = len(task.kinds), task.capacity - first - last
        middle = range(first, depth - last)
        similarity = task.similarity()[first : depth - last, first : depth - last]
        inner = rule(GroupingTask([0] * len(middle), between, task.seed, lambda: similarity))
        ends = [[layer] for layer in (*range(first), *range(depth - last, depth))]
        return sorted([*ends, *([middle[index] for index in group] for group in inner)])

    GROUPINGS["deconfliction"] = protected


def group_by_function() -> None:
    """Similarity of what the layers add to the residual stream on calibration texts, for that of their weights."""

    class Functional(hf_devft.DevFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._similarity = self._similarity_of_what_is_added

        @torch.no_grad()
        def _similarity_of_what_is_added(self) -> torch.Tensor:
            model = build_whole(self._base).eval()
            layers, added = find_layer_stack(model).layers, {}

            def note(layer, args, kwargs, output):
                before = args[0] if args else kwargs["hidden_states"]
                added[layer] = (output[0] if isinstance(output, tuple) else output) - before

            hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
            grams = []
            for batch in self._calibration_batches():
                model(**self._prepare_inputs(batch))
                rows = torch.stack([added[layer][batch["attention_mask"].bool()] for layer in layers])
                rows = torch.nn.functional.normalize(rows.float(), dim=-1)
                grams.append(torch.einsum("ith,jth->ij", rows, rows) / rows.shape[1])
            for hook in hooks:
                hook.remove()
            return torch.stack(grams).mean(0)

    hf_devft.DevFTTrainer = Functional


def narrow(rank: int) -> None:
    """From the second stage on, the best approximation of the adapter's product by one of a lower rank; the smaller
    submodel teaches with what it has."""

    class Narrowing(hf_devft.DevFTTrainer):
        def _enter_stage(self, stage, checkpoint):
            self._wide = self.peft_config, self._full_adapter
            if stage.stage > 1:
                self.peft_config = copy.deepcopy(self.peft_config)
                self.peft_config.r = rank
                ratio = lora_scaling(self._wide[0]) / lora_scaling(self.peft_config)
                self._full_adapter = self._narrowed(ratio)
            super()._enter_stage(stage, checkpoint)

        def _narrowed(self, ratio: float) -> dict[str, torch.Tensor]:
            state, narrowed = self._full_adapter, {}
            for key in (key for key in state if "lora_A" in key):
                other = key.replace("lora_A", "lora_B")
                u, s, v = truncated_product(state[other].double(), state[key].double(), rank)
                root = (ratio * s).sqrt()
                narrowed |= {key: (root[:, None] * v).float(), other: (u * root).float()}
            return narrowed

        def _submodel_of(self, earlier, base, stack):
            narrow = self.peft_config, self._full_adapter
            self.peft_config, self._full_adapter = self._wide
            try:
                return super()._submodel_of(earlier, base, stack)
            finally:
                self.peft_config, self._full_adapter = narrow

    hf_devft.DevFTTrainer = Narrowing


# Name -> (what it changes of the package, further flags).
IDEAS: dict[str, tuple[Callable[[], None] | None, list[str]]] = {
    "as it is": (None, []),
    "a group's members in turn, client by client": (lambda: alternate("client"), []),
    "a group's members in turn, round by round": (lambda: alternate("round"), []),
    "the last layer protected": (lambda: protect(0, 1), []),
    "the first and the last layer protected": (lambda: protect(1, 1), []),
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
    publish_runs(options, table(results, early | COLUMNS))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in IDEAS:
        try_out(sys.argv[1], sys.argv[2:])
    else:
        main()
