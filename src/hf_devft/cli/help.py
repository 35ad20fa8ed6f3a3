"""The help of `devft train`: one screen of what most runs set."""

import textwrap

from hf_devft.cli.configs import packaged_configs


_GROUPS = {
    "data and model": {
        "model_name_or_path": 'Hub name, folder, .gguf file, or "embedded"',
        "train_file": "JSON(L), CSV, text, ...: a file, a client",
        "dataset_name": "datasets of the Hub, or folders",
        "eval_file": "files to evaluate on; default: 10 % of the rows",
    },
    "stages": {
        "stage_layers": "layers of each submodel, such as 4 8 16",
        "stage_rounds": "rounds of each stage, one number or several",
        "grouping": "which layers share a group",
        "fusion": "what stands for a group in the submodel",
        "transfer": "which layers get a group's adapter",
    },
    "federation": {
        "num_clients": "of one file or dataset; default 20",
        "clients_per_round": "sampled for each round",
        "local_steps": "optimiser steps of a client in a round",
        "partition": "iid, dirichlet or natural",
        "federated_method": "fedit, ffa_lora, fedsa_lora, ...; joined by +",
        "wire_dtype": "what travels: fp32, bf16, int8, int4",
        "dp_target_epsilon": "differential privacy: ε",
    },
    "adapter and training": {
        "lora_r": "rank",
        "learning_rate": "of the clients' steps",
        "per_device_train_batch_size": "rows of a step",
    },
    "run": {
        "output_dir": "where adapters, card, plot and checkpoints go",
        "resume_from_checkpoint": '"last" starts a run, or goes on with it',
        "push_to_hub": "each stage, with a card; hub_model_id says where",
        "seed": "same seed, same adapter",
        "plan": "only say what the run would cost",
    },
}
_WIDTH = 80


def short_help(command: str = "train") -> str:
    """Return one screen: how a command of `devft` is called, the packaged configs, the flags that most runs set."""
    lines = [
        f"usage: devft {command} [--config FILE|NAME] [--key value ...]",
        "",
        "Without --config: own_data with data of one's own, else quickstart. Configs:",
        *textwrap.wrap(", ".join(packaged_configs()), _WIDTH, initial_indent="  ", subsequent_indent="  "),
    ]
    for title, flags in _GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  --{name:<27} {text}" for name, text in flags.items()]
    return "\n".join([*lines, "", "--help-all lists every key of a config, TrainingArguments' among them."])
