"""Start a new run, on other data and with other stages, from an adapter that an earlier one has left.

python examples/continue_from_stage.py outputs/quickstart/stage-2

(A run that was stopped goes on by `trainer.train(resume_from_checkpoint="last")` instead.)
"""

import argparse

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import task_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="a stage's folder, or a name on the Hub")
trainer = DevFTTrainer(
    "embedded",
    DevFTConfig(output_dir="outputs/continued", stage_layers=[8, 16], stage_rounds=[2], learning_rate=1e-3),
    peft_config=parser.parse_args().adapter,
    train_dataset=task_dataset(400, seed=1),
)
trainer.train()
