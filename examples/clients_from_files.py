"""One client for each file of a folder, a part of each client's rows held out to evaluate on.

python examples/clients_from_files.py my-clients
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.tasks.data import load_files


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="with a file for each client, .csv or .jsonl")
files = sorted(path for path in parser.parse_args().folder.iterdir() if path.suffix in (".csv", ".jsonl"))
clients = {path.name: load_files([path]) for path in files}
trainer = DevFTTrainer(
    "embedded",  # or any name on the Hub
    DevFTConfig(
        output_dir="outputs/clients-from-files",
        stage_layers=[4, 16],
        stage_rounds=[2],
        learning_rate=2e-3,
        client_eval_size=0.25,
    ),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=clients,
)
trainer.train()
metrics = trainer.stages[-1].metrics
for name in clients:
    print(f"{name}: loss {metrics[f'eval_full_{name}_loss']:.3f}")
print(f"mean {metrics['eval_full_loss']:.3f}, worst {metrics['eval_full_worst_loss']:.3f}")
