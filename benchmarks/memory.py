"""What a stage holds in memory, against its share of the model: `python benchmarks/memory.py`.

Makes a base of 16 layers and 860 MB, gives it by name and as a loaded model, and writes the peak of the process's
resident memory while a stage is set up and while it trains, above what it was before the base was loaded, to
`results/memory.md`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import RESULTS, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


TARGET = RESULTS / "memory.md"
STAGES = [2, 4, 8, 16]


def make_base(folder: Path) -> tuple[float, float]:
    """Save a base; returns the MB of what all stages share, and of one layer."""
    from hf_devft.embedded import BASE_PATH

    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=STAGES[-1],
        num_attention_heads=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(folder)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    everything = sum(parameter.nbytes for parameter in model.parameters())
    return (everything - STAGES[-1] * layer) / 1e6, layer / 1e6


def measure(folder: Path, loaded: bool) -> list[list[float]]:
    """Peaks [while set up, while training] of each stage, in MB above the memory before the base was there."""
    from peft import LoraConfig

    from hf_devft import DevFTConfig, DevFTTrainer
    from hf_devft.embedded import task_dataset
    from hf_devft.run.peak_memory import PeakMemory

    memory = PeakMemory(torch.device("cpu"))
    rows = task_dataset(16)
    memory.release()
    memory.reset()
    before = memory.read()
    args = DevFTConfig(
        output_dir=str(folder.parent / f"run-{loaded}"), stage_layers=STAGES, fusion="differential", stage_rounds=[1],
        num_clients=2, local_steps=1,
        per_device_train_batch_size=1, save_strategy="no", disable_tqdm=True, use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if loaded else str(folder)
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DevFTTrainer(model, args, peft_config=adapter, train_dataset=rows, processing_class=tokenizer)
    del model
    trainer.train()
    keys = ("setup_peak_memory", "peak_memory")
    return [[(stage.totals[key] - before) / 1e6 for key in keys] for stage in trainer.stages]


def table(shared: float, layer: float, named: list, loaded: list) -> str:
    lines = [
        "Peak of resident memory above what it was before the base was there, in MB, with the paper's rules.\n",
        "| layers | shared + layers | by name: set-up | by name: training | loaded: set-up | loaded: training |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for layers, by_name, in_memory in zip(STAGES, named, loaded, strict=True):
        cells = [shared + layers * layer, *by_name, *in_memory]
        lines.append(f"| {layers} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    return "\n".join(lines) + f"\n\n`python benchmarks/memory.py`, {machine()}.\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        shared, layer = make_base(base)
        named, loaded = (
            json.loads(subprocess.check_output([sys.executable, __file__, base, kind], text=True).splitlines()[-1])
            for kind in ("name", "loaded")
        )
    TARGET.write_text(table(shared, layer, named, loaded))
    print(TARGET.read_text())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] == "loaded")))
    else:
        main()
