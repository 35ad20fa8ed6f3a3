"""A callback of transformers, which sees rounds as steps: stop when a budget of bytes is spent.

python examples/own_callback.py
"""

from peft import LoraConfig
from transformers import TrainerCallback

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import task_dataset


class ByteBudget(TrainerCallback):
    """Ends the run after the round in which the adapters that were sent came to `budget` bytes."""

    def __init__(self, budget: int):
        self.budget = budget

    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop |= logs.get("bytes", 0) >= self.budget


trainer = DevFTTrainer(
    "embedded",
    DevFTConfig(output_dir="outputs/own-callback", stage_layers=[4, 16], stage_rounds=[4], learning_rate=2e-3),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=task_dataset(400),
    callbacks=[ByteBudget(3_000_000)],
)
trainer.train()
print(f"{trainer.state.global_step} rounds, {trainer.ledger.bytes / 1e6:.1f} MB")
