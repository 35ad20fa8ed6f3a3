"""A tiny run to be launched on several processes: `launched.py '{"option": value}'`, options of `conftest.config`."""

import json
import sys

from conftest import config, lora, tiny_llama
from transformers import AutoTokenizer

from hf_devft import DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset


def main(options: dict) -> DevFTTrainer:
    evaluate = options.pop("evaluate", False)
    args = config(**options)  # before the model, as ZeRO-3 needs it
    trainer = DevFTTrainer(
        tiny_llama(),
        args,
        peft_config=lora(),
        train_dataset=task_dataset(120, seed=0),
        eval_dataset=task_dataset(16, split="test", seed=0) if evaluate else None,
        processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
