"""What leaks: who was in the data, from the last adapter; and which tokens, from one client's update.

    python benchmarks/leakage.py

Membership: 400 tasks of 20 clients, trained so long that they are learned by heart, against 400 that nobody has
trained on. The attacker says "member" where the loss is small (Yeom et al. 2018, arXiv 1709.01604, Adversary 2), or
smaller than under a shadow run on other rows of the same kind (Watson et al. 2022, arXiv 2111.08440, eq. 3). 50 % of
AUC is to know nothing.

Tokens: the attacker is the server, and sees what one client of a round sends. Its gradient of the first layer's B lies
in the span of A·x over the inputs x of that layer, which are known for each token of the vocabulary: those nearest to
the span are said to be the client's (Petrov et al. 2024, arXiv 2405.15586, §4, for LoRA: ours). The attacker names as
many as the client's row has of its own (tokens of all rows, such as the question mark's, do not count); how many
of them are right? Writes `results/leakage.md`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from attacks import update_of
from datasets import Dataset
from machine import parser, publish
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_trainer
from hf_devft.embedded import task_dataset
from hf_devft.federation.client_side import Exchange
from hf_devft.tasks.data import IGNORED, tokenize
from hf_devft.trainer.local_clients import LocalClients
from hf_devft.trainer.mixin import DevFTMixin


CONFIG = Path(__file__).parent.parent / "recipes" / "configs" / "quickstart.yaml"
QUIET = "--eval_strategy no --eval_on_start false --save_strategy no --predict_with_generate false --disable_tqdm true"
ROWS = 400
MEMBERSHIP = f"{QUIET} --task_rows {ROWS} --stage_layers 4 16 --stage_rounds 8 6 --learning_rate 6e-3"
MEMBERSHIP += " --per_device_train_batch_size 8 --clients_per_round 4 --local_steps 10"
PRIVATE = "--federated_method ffa_lora --dp_target_epsilon 8 --dp_clipping_norm 1.0"
RUNS = {
    "no privacy": "",
    "FFA-LoRA": "--federated_method ffa_lora",
    "FFA-LoRA, ε = 8": PRIVATE,
}
# One local step of clients of one row, by plain gradient descent unless it says otherwise.
INVERSION = f"{QUIET} --task_rows 8 --num_clients 8 --clients_per_round 8 --partition iid --stage_layers 16"
INVERSION += " --stage_rounds 1 --local_steps 1 --per_device_train_batch_size 1 --learning_rate 1e-2 --max_grad_norm 0"
SGD = "--optim sgd"
UPDATES = {
    "rank 64, a step of SGD": f"{SGD} --lora_r 64",
    "rank 8, a step of SGD": f"{SGD} --lora_r 8",
    "rank 64, a step of AdamW": "--lora_r 64",
    "rank 64, 10 steps of AdamW (the default)": "--lora_r 64 --local_steps 10",
    "rank 64, a step of SGD, int8 wire": f"{SGD} --lora_r 64 --wire_dtype int8",
    "rank 64, a step of SGD, what secure aggregation shows of 8 clients": f"{SGD} --lora_r 64",
    "rank 64, a step of SGD, the noisy mean of ε = 8": f"{SGD} --lora_r 64",
}


def train(flags: str, seed: int, folder: str) -> DevFTMixin:
    """A run of the quickstart's with other flags."""
    trainer = make_trainer(*parse_arguments([*flags.split(), "--seed", str(seed), "--output_dir", folder], CONFIG))
    trainer.train()
    return trainer


# --- membership -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: PreTrainedModel, rows: Dataset) -> torch.Tensor:
    """The mean loss of each row's answer."""
    found = []
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
        found.append(cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], ignore_index=IGNORED))
    return torch.stack(found)


def membership(flags: str, members: Dataset, others: Dataset) -> list[str]:
    """AUC and the true positives at 1 % of false ones, of both attacks."""
    measured = []
    for seed in (0, 1):  # the target, and a shadow run, whose made-up rows are others
        with tempfile.TemporaryDirectory() as folder:
            model = train(f"{MEMBERSHIP} {flags}", seed, folder).model.eval()
        measured.append([losses(model, rows) for rows in (members, others)])
    target, shadow = measured
    truth = [1] * len(members) + [0] * len(others)
    cells = [f"{target[0].mean():.3f}, {target[1].mean():.3f}"]
    for scores in (-torch.cat(target), torch.cat(shadow) - torch.cat(target)):
        false, true, _ = roc_curve(truth, scores.tolist())
        cells.append(f"{roc_auc_score(truth, scores.tolist()):.1%}, {true[false <= 0.01].max():.1%}")
    return cells


# --- tokens ---------------------------------------------------------------------------------------------------------


def updates_of_a_round(flags: str) -> tuple[DevFTMixin, dict[int, torch.Tensor], torch.Tensor]:
    """(trainer, {client: its update of the one round}, what the server makes of all)."""
    seen: dict[int, torch.Tensor] = {}
    exchange = LocalClients.exchange

    def watched(self: LocalClients, learning_rate: float) -> Exchange:
        def carry(*call) -> Iterator:
            for message, answer in exchange(self, learning_rate)(*call):
                seen[message.client] = update_of(message, answer).clone()
                yield message, answer

        return carry

    LocalClients.exchange = watched  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = train(f"{INVERSION} {flags}", 0, folder)
    finally:
        LocalClients.exchange = exchange  # type: ignore[method-assign]
    return trainer, seen, torch.stack(list(seen.values())).mean(dim=0)


def first_b(trainer: DevFTMixin, update: torch.Tensor) -> torch.Tensor:
    """The part of the first layer's B of the query projection in an update."""
    state, start = trainer.run.adapter.state, 0
    for key, tensor in state.items():
        if "layers.0.self_attn.q_proj.lora_B" in key:
            return update[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    raise KeyError("the first layer's B")


@torch.no_grad()
def recovered(trainer: DevFTMixin, gradient: torch.Tensor, client: int) -> tuple[float, int]:
    """(the part of a client's tokens that are found, how many they are)."""
    base, layer = trainer.model.get_base_model(), trainer.model.get_base_model().model.layers[0]
    a = layer.self_attn.q_proj.lora_A["default"].weight
    inputs = layer.input_layernorm(base.get_input_embeddings().weight) @ a.T  # vocabulary x rank
    row = list(trainer.clients.rows.values())[client]
    everyone = [set(ids) for ids in trainer.train_dataset["input_ids"]]
    own = everyone[int(row[0])] - set.intersection(*everyone)  # what every row has tells nothing
    _, values, span = torch.linalg.svd(gradient.double())
    span = span[: len(values)][values > 1e-5 * values[0]][: len(own)]  # below are what int8 and noise have added
    inputs = inputs.double()
    distance = (inputs - inputs @ span.T @ span).norm(dim=1) / inputs.norm(dim=1)
    order = torch.randperm(len(distance), generator=torch.Generator().manual_seed(0))  # of those at one distance
    ranked = order[distance[order].sort(stable=True).indices]
    return len(own & set(ranked[: len(own)].tolist())) / len(own), len(own)


def inversion(name: str, flags: str) -> list[str]:
    """Tokens of a client that are found."""
    trainer, updates, mean = updates_of_a_round(flags)
    client = min(updates)
    update = updates[client]
    if "secure" in name:
        update = mean
    if "noisy" in name:  # clipped to their own norm, z = 0.63; with more clients the mean and its noise shrink alike
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        update = mean + 0.63 * update.norm() / len(updates) * noise
    part, count = recovered(trainer, first_b(trainer, update), client)
    return [f"{part:.0%} of {count}"]


def main() -> None:
    options = parser("leakage", __doc__).parse_args()
    trainer_rows = task_dataset(ROWS, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*MEMBERSHIP.split(), "--output_dir", folder]
        tokenizer = make_trainer(*parse_arguments(flags, CONFIG)).processing_class
    members, others = (tokenize(rows, tokenizer, 512) for rows in (trainer_rows, task_dataset(ROWS, seed=99)))
    lines = ["| run | loss of members, others | loss threshold | against a shadow run |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {' | '.join(membership(flags, members, others))} |" for name, flags in RUNS.items()]
    lines += ["", "Membership: AUC, and true positives at 1 % of false ones.", ""]
    lines += ["| a client's message | tokens found |", "|---|---:|"]
    lines += [f"| {name} | {' | '.join(inversion(name, flags))} |" for name, flags in UPDATES.items()]
    publish(options.results, lines, "leakage.py")


if __name__ == "__main__":
    main()
