"""What a round costs beside forward, backward and optimiser step: `python benchmarks/overhead.py`.

The rounds of a run, against a plain PyTorch loop that takes the same local steps on the same batches and submodel,
leaves out the same logits, and does nothing else, in one process, in turns. Writes `results/overhead.md`.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from bases import BASES, lora, make_base, rows, size_of, tokenizer
from machine import parser, publish
from transformers import PreTrainedModel, set_seed

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.trainer.session import TrainingSession


CLIENTS, BATCH = 2, 16
STEPS = {"quickstart": 10, "larger": 3}  # fewer are the harder test: what a client costs stands beside less work


@contextmanager
def in_turns() -> Iterator[list[float]]:
    """Before every second round, times a plain loop over what the round is going to do, and after the others; gives
    the seconds of these loops."""
    plain, run_round = [], TrainingSession.run_round

    def timed_plainly(session, active, batches, learning_rate):
        with session.trainer.leaving_logits_out():
            return plain_round(active.model, batches, learning_rate)

    def timed(self, active, learning_rate):
        index = self.trainer.state.global_step
        batches = next_batches(self, index)
        if index % 2 == 0:
            plain.append(timed_plainly(self, active, batches, learning_rate))
        outcome = run_round(self, active, learning_rate)
        if index % 2 == 1:
            plain.append(timed_plainly(self, active, batches, learning_rate))
            active.engine.write(active.adapter)
        return outcome

    TrainingSession.run_round = timed
    try:
        yield plain
    finally:
        TrainingSession.run_round = run_round


def next_batches(session: TrainingSession, index: int) -> list[list[dict]]:
    """Those of each client of the round to come, from a loader of their own."""
    batches, steps = session.batches_of([index], 0), session.trainer.args.local_steps
    sampled = session.federation.selection.sampled(index, 0)
    return [list(islice(batches.next_client(), steps)) for _ in sampled]


def plain_round(model: torch.nn.Module, clients: list[list[dict]], learning_rate: float) -> float:
    """Seconds of the local steps of a round's clients, written by hand."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    model.train()
    for batches in clients:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        for batch in batches:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - started


def measure(base: PreTrainedModel, stages: list[int], steps: int, rounds: int) -> list[tuple[int, float, float]]:
    """(layers, median seconds of a plain round, median ratio of a round to the plain one beside it) of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=stages, stage_rounds=[rounds + 2], clients_per_round=CLIENTS,
            local_steps=steps, per_device_train_batch_size=BATCH, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DevFTTrainer(base, args, peft_config=lora(), train_dataset=rows(1000), processing_class=tokenizer())
        with in_turns() as loops:
            trainer.train()
    found = []
    for stage in trainer.stages:
        pairs = [
            (plain, record.seconds)
            for plain, record in zip(loops, trainer.ledger.rounds, strict=True)
            if record.stage == stage.stage
        ][2:]  # the first ones warm up
        ratio = statistics.median(seconds / plain for plain, seconds in pairs)
        found.append((stage.num_layers, statistics.median(plain for plain, _ in pairs), ratio))
    return found


def main() -> None:
    command_line = parser("overhead", __doc__)
    command_line.add_argument("--rounds", type=int, default=20, help="of each stage")
    command_line.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    options = command_line.parse_args()
    set_seed(0)
    lines = ["| base | steps a client | layers | plain loop, s | a round / plain loop |", "|---|---:|---:|---:|---:|"]
    for name in options.bases:
        base, stages = make_base(name), BASES[name][1]
        size = size_of(base)
        for layers, seconds, ratio in measure(base, stages, STEPS[name], options.rounds):
            lines.append(f"| {name}, {size} | {STEPS[name]} | {layers} | {seconds:.2f} | {ratio:.3f} |")
    publish(options.results, lines, f"overhead.py --rounds {options.rounds}", "medians")


if __name__ == "__main__":
    main()
