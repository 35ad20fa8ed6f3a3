"""A tiny run of each of several methods or options, one after the other, to be launched on several processes:
`launched_methods.py '{"output_dir": ..., "runs": {name: options}}'`."""

import json
import sys
from pathlib import Path

from conftest import config, freeze_what_is_imported, lora, tiny_llama, write_secret
from transformers import AutoTokenizer

from hf_devft import DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset


def main(output_dir: str, runs: dict[str, dict], **options) -> None:
    for name, own in runs.items():
        # Plain gradient steps: Adam's division would make rounding visible where gradients are nearly 0.
        options = {"clients_per_round": 3, "optim": "sgd", "learning_rate": 1.0} | options
        args = config(output_dir=Path(output_dir) / name, **options | own)
        if args.is_private:
            write_secret(args.output_dir)  # that of all launches
        trainer = DevFTTrainer(
            tiny_llama(),
            args,
            peft_config=lora(r=4),
            train_dataset=task_dataset(120, seed=0),
            eval_dataset=task_dataset(16, split="test", seed=0) if args.eval_strategy != "no" else None,
            calibration_dataset=task_dataset(8, seed=1),
            processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
        )
        trainer.train()
        del trainer
        freeze_what_is_imported()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
