"""Rounds with several clients in one batch, against one after another: `python benchmarks/clients_per_batch.py`.

Rounds of 8 clients, 5 local steps, on an accelerator where there is one. Writes `results/clients_per_batch.md`.
"""

import statistics
import tempfile

import torch
from bases import BASES, lora, make_base, rows, size_of, tokenizer
from machine import parser, publish
from transformers import set_seed

from hf_devft import DevFTConfig, DevFTTrainer


CLIENTS, COUNTS = 8, (1, 2, 4, 8)


def measure(name: str, count: int, batch: int, rounds: int) -> tuple[float, torch.Tensor]:
    """The median round's seconds, and the adapter."""
    set_seed(0)
    base, layers = make_base(name), BASES[name][1][-1]
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=[layers], stage_rounds=[rounds + 1], clients_per_round=CLIENTS,
            local_steps=5, per_device_train_batch_size=batch, clients_per_batch=count, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DevFTTrainer(base, args, peft_config=lora(), train_dataset=rows(1000), processing_class=tokenizer())
        trainer.train()
    adapter = torch.cat([tensor.flatten() for tensor in trainer.run.adapter.state.values()])
    return statistics.median(record.seconds for record in trainer.ledger.rounds[1:]), adapter


def main() -> None:
    command_line = parser("clients_per_batch", __doc__)
    command_line.add_argument("--rounds", type=int, default=5)
    command_line.add_argument("--repeats", type=int, default=2)
    command_line.add_argument("--bases", nargs="+", choices=BASES, default=["quickstart"])
    options = command_line.parse_args()
    lines = [
        "| base | rows a step | clients in a batch | a round, s | times as fast | adapters differ by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in options.bases:
        for batch in (1, 4, 16):
            found = {count: [] for count in COUNTS}
            for _ in range(options.repeats):  # in turns
                for count in COUNTS:
                    found[count].append(measure(name, count, batch, options.rounds))
            seconds = {count: min(second for second, _ in runs) for count, runs in found.items()}
            alone = found[1][0][1]
            for count in COUNTS:
                differs = ((found[count][0][1] - alone).norm() / alone.norm()).item()
                faster = seconds[1] / seconds[count]
                cells = f"{batch} | {count} | {seconds[count]:.2f} | {faster:.2f} | {differs:.0e}"
                lines.append(f"| {name}, {size_of(make_base(name))} | {cells} |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    command = f"clients_per_batch.py --rounds {options.rounds} --repeats {options.repeats}"
    publish(options.results, lines, command, device)


if __name__ == "__main__":
    main()
