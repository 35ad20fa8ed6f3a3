"""Bring your own clients: {name: dataset}, any causal language model, any LoRA config.

python examples/own_clients.py
"""

from datasets import Dataset
from peft import LoraConfig

from hf_devft import DevFTConfig, DevFTTrainer


clients = {
    name: Dataset.from_list([{"prompt": f"{name} says:", "completion": f" {word}"}] * 8)
    for name, word in {"north": "snow", "south": "sun", "west": "rain"}.items()
}
trainer = DevFTTrainer(
    "embedded",  # or any name on the Hub
    DevFTConfig(output_dir="outputs/own-clients", stage_layers=[4, 16], stage_rounds=[2], learning_rate=2e-3),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=clients,
)
trainer.train()
