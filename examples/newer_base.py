"""Take a stage's adapter to another version of its base: how far apart are they, and go on training there.

python examples/newer_base.py outputs/quickstart/stage-3 path/or/name/of/the/new/base
"""

import argparse

from peft import PeftConfig

from hf_devft import DevFTConfig, DevFTTrainer, compare_bases
from hf_devft.embedded import task_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="a stage's folder")
parser.add_argument("base", help="the newer one: a folder, or a name on the Hub")
args = parser.parse_args()
print(compare_bases(PeftConfig.from_pretrained(args.adapter).base_model_name_or_path, args.base))
trainer = DevFTTrainer(
    args.base,
    DevFTConfig("outputs/newer-base", stage_layers=[16], stage_rounds=[1], local_steps=4, learning_rate=2e-3),
    peft_config=args.adapter,  # its config and its weights
    train_dataset=task_dataset(400, seed=0),
)
trainer.train()
