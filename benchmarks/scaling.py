"""What grows with what: `python benchmarks/scaling.py`.

Start-up (from loaded base and rows to the first round), a stage's set-up, a round and the process's peak memory,
against the clients that are defined and sampled, the depth, the number of stages and the adapter's rank. All else is
the same: the embedded base's shape with random weights, 20,000 rows of text, 2 local steps of 4 rows a client, so that
there is little to compute and the machinery shows. Every line is a process of its own. Writes `results/scaling.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from bases import lora, rows, tokenizer
from datasets import disable_progress_bars
from machine import parser, publish
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import BASE_PATH
from hf_devft.run.peak_memory import PeakMemory


USUAL = {"clients": 100, "sampled": 2, "layers": 16, "stages": [16], "rank": 8, "rows": 20_000}
POINTS = [
    *({"clients": clients} for clients in (10, 100, 1000, 10_000)),
    *({"clients": clients, "sampled": 20} for clients in (100, 1000, 10_000)),
    *({"clients": clients, "rows": 80_000} for clients in (100, 10_000)),
    *({"layers": layers, "stages": [layers]} for layers in (4, 16, 64)),
    *({"stages": stages} for stages in ([8, 16], [2, 4, 8, 16], [2, 4, 6, 8, 10, 12, 14, 16])),
    *({"rank": rank} for rank in (1, 8, 64)),
]


def measure(point: dict, rounds: int) -> dict[str, float]:
    """Seconds of start-up, of a stage's set-up (mean) and of a round (median over the last stage), and MB."""
    disable_progress_bars()
    set_seed(0)
    config = AutoConfig.from_pretrained(BASE_PATH, num_hidden_layers=point["layers"])
    base, data = AutoModelForCausalLM.from_config(config), rows(point["rows"])
    memory = PeakMemory(torch.device("cpu"))
    memory.release()
    memory.reset()
    before = memory.read()
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=point["stages"], stage_rounds=[rounds], num_clients=point["clients"],
            clients_per_round=point["sampled"], local_steps=2, per_device_train_batch_size=4, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        started = time.perf_counter()
        adapter = lora(point["rank"])
        trainer = DevFTTrainer(base, args, peft_config=adapter, train_dataset=data, processing_class=tokenizer())
        startup = time.perf_counter() - started
        trainer.train()
    last = [record.seconds for record in trainer.ledger.rounds if record.stage == len(trainer.stages)]
    peak = max(record.peak_memory for record in trainer.ledger.rounds)
    return {
        "startup": startup,
        "setup": statistics.mean(stage.totals["setup_seconds"] for stage in trainer.stages),
        "round": statistics.median(last),
        "memory": (peak - before) / 1e6,
    }


def main() -> None:
    command_line = parser("scaling", __doc__)
    command_line.add_argument("--rounds", type=int, default=10, help="of each stage")
    command_line.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    if options.point is not None:
        print(json.dumps(measure(options.point, options.rounds)))
        return
    lines = [
        "| | start-up, s | a stage's set-up, s | a round, s | a round / client, ms | peak memory above start, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for point in POINTS:
        whole = USUAL | point
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--point", json.dumps(whole)]
        found = json.loads(subprocess.check_output(command, text=True, stderr=subprocess.PIPE).splitlines()[-1])
        name = ", ".join(f"{key} {value}" for key, value in point.items())
        each = 1000 * found["round"] / whole["sampled"]
        lines.append(
            f"| {name} | {found['startup']:.2f} | {found['setup']:.2f} | {found['round']:.3f} | {each:.0f} | "
            f"{found['memory']:.0f} |"
        )
        print(lines[-1], flush=True)
        publish(options.results, lines, f"scaling.py --rounds {options.rounds}", "so far", show=False)
    usual = ", ".join(f"{key} {value}" for key, value in USUAL.items())
    lines += ["", f"Where a line says nothing else: {usual}."]
    publish(options.results, lines, f"scaling.py --rounds {options.rounds}")


if __name__ == "__main__":
    main()
