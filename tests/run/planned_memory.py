"""Planned and measured peak memory of a run with the options of the command line, in JSON, in a process of its own;
prints what the clients and the server take: {who: [[planned, measured], ...]}, by stage."""

import json
import sys
import tempfile

import torch
from accelerate import init_empty_weights
from conftest import config, lora
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_devft import DevFTTrainer
from hf_devft.embedded import BASE_PATH, task_dataset
from hf_devft.federation.partition import ClientData
from hf_devft.run.peak_memory import PeakMemory
from hf_devft.run.plan import plan_run


def base(hidden_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=4,
            num_attention_heads=8, tie_word_embeddings=True,
        )
    )  # fmt: skip


def trainer(args, hidden_size: int) -> DevFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    return DevFTTrainer(
        base(hidden_size), args, peft_config=lora(), train_dataset=task_dataset(64), processing_class=tokenizer,
        calibration_dataset=task_dataset(16, seed=1),
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder, stage_rounds=[1], num_clients=2, local_steps=2, per_device_train_batch_size=16,
            calibration_samples=16, generation_max_new_tokens=12, **json.loads(sys.argv[1]),
        )  # fmt: skip
        small = trainer(args, 16)  # loads the libraries
        small.train()
        clients = ClientData(small.train_dataset, small.clients.rows)
        memory = PeakMemory(torch.device("cpu"))
        memory.release()
        before = memory.read()
        large = trainer(args, 512)
        large.train()
        with init_empty_weights():
            empty = base(512)
        empty.tie_weights()
        plan = plan_run(args, empty, lora(), clients)
    pairs = list(zip(plan.stages, large.stages, strict=True))
    clients = [[planned.client_memory, stage.totals["peak_memory"] - before] for planned, stage in pairs]
    server = [[planned.server_memory, stage.totals["setup_peak_memory"] - before] for planned, stage in pairs]
    print(json.dumps({"clients": clients, "server": server}))


if __name__ == "__main__":
    main()
