"""Resident memory over ten stage changes: engines that outlive their stage would make it grow.

    accelerate launch --config_file recipes/accelerate/zero3.yaml benchmarks/stage_changes.py

Prints the main process's resident memory (MB) after each stage of 1, 2, ... 11 layers of a 70 MB base.
"""

import tempfile

import psutil
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from hf_devft import DevFTConfig, DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset
from hf_devft.run.peak_memory import PeakMemory


LAYERS = 11


class Resident(TrainerCallback):
    """Memory when a stage begins: the one before is gone, its own submodel is there."""

    def __init__(self):
        self.seen = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        PeakMemory(args.device).release()
        self.seen.append(round(psutil.Process().memory_info().rss / 1e6))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = DevFTConfig(
            output_dir=folder, stage_layers=list(range(1, LAYERS + 1)), stage_rounds=[1], num_clients=4, local_steps=2,
            per_device_train_batch_size=4, grouping="even", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        set_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048, hidden_size=512, intermediate_size=512, num_hidden_layers=LAYERS,
                num_attention_heads=4, tie_word_embeddings=True,
            )
        )  # fmt: skip
        resident = Resident()
        trainer = DevFTTrainer(
            base,
            args,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            train_dataset=task_dataset(100),
            processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
            callbacks=[resident],
        )
        trainer.train()
        if trainer.is_world_process_zero():
            print(f"{trainer.accelerator.distributed_type.value}:", *resident.seen)


if __name__ == "__main__":
    main()
