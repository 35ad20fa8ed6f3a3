"""Text classification with an encoder: its new head is trained whole, travels and is averaged.

python examples/classification.py FacebookAI/roberta-base
"""

import argparse

from datasets import Dataset
from peft import LoraConfig

from hf_devft import DevFTConfig, DevFTTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base", help="an encoder: a folder, or a name on the Hub")
base = parser.parse_args().base
rows = Dataset.from_dict({
    "text": [f"the {thing} was {word}" for thing in ("film", "food", "trip", "game") for word in ("good", "bad") * 8],
    "label": ["praise", "complaint"] * 32,
})  # fmt: skip
trainer = DevFTTrainer(
    base,
    DevFTConfig(
        output_dir="outputs/classification",
        stage_rounds=[3],
        num_clients=4,
        learning_rate=2e-3,
        max_length=32,
        client_eval_size=0.25,
    ),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"),
    train_dataset=rows,
)
trainer.train()
print(trainer.model.config.id2label)
