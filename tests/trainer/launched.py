"""A tiny run, to be launched on several processes: `launched.py '{"option": value}'`.

Options are those of `conftest.config`, `fail`: [process, round], where that process meets an error, and
`makes_adapter`: each process brings an adapter of its own making.
"""

import json
import sys

import torch
from conftest import config, lora, tiny_llama
from peft import get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from hf_devft import DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset


class Fail(TrainerCallback):
    def __init__(self, process: int, round_number: int):
        self.where = (process, round_number)

    def on_step_begin(self, args, state, control, **kwargs):
        if (args.process_index, state.global_step + 1) == self.where:
            raise OSError(f"the disk of process {args.process_index} is full")


def main(options: dict) -> DevFTTrainer:
    fail, makes_adapter = options.pop("fail", None), options.pop("makes_adapter", False)
    args = config(**options)  # before the model, as ZeRO-3 needs it
    model = tiny_llama()
    if makes_adapter:  # each process by random numbers of its own
        torch.manual_seed(args.process_index)
        model = get_peft_model(model, lora())
    trainer = DevFTTrainer(
        model,
        args,
        peft_config=None if makes_adapter else lora(),
        train_dataset=task_dataset(120, seed=0),
        eval_dataset=task_dataset(16, split="test", seed=0) if args.eval_strategy != "no" else None,
        calibration_dataset=task_dataset(8, seed=1),
        processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
        callbacks=[Fail(*fail)] if fail else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(f"{args.output_dir}-saved")  # under ZeRO-3, every process has a part of it
    return trainer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
