"""A federated method of your own, in one file: the mean of those clients whose change has the sign that most of the
change has, value by value (TIES, Yadav et al. 2023, arXiv 2306.01708, §3), so that clients of unlike data do not undo
each other's work. Registered by one line; nothing of ours is touched.

python examples/own_method.py
"""

import torch
from peft import LoraConfig

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import task_dataset
from hf_devft.federation.methods import METHODS
from hf_devft.federation.methods.stacking import Stacking


class ElectedSign(Stacking):
    """`Stacking` keeps a round's adapters, also over several processes; what is left to say is how they combine."""

    def end_round(self) -> torch.Tensor:
        adapters, _ = self.received()
        before = self.wide(self.adapter)  # where, and as precise as, sums are
        changes = torch.stack([torch.cat([tensor.flatten() for tensor in each]) for each in adapters]) - before
        agrees = changes.sign() == changes.sum(dim=0).sign()
        return (before + (changes * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)).float()


METHODS["elected_sign"] = ElectedSign

if __name__ == "__main__":
    trainer = DevFTTrainer(
        "embedded",
        DevFTConfig(
            output_dir="outputs/own-method", federated_method="elected_sign", clients_per_round=3,
            stage_layers=[4, 16], stage_rounds=[2], local_steps=4, learning_rate=2e-3,
        ),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=task_dataset(400, seed=0),
    )  # fmt: skip
    trainer.train()
