"""What the server tells its clients of a run's local training, and what they take of it."""

import json
from dataclasses import fields
from typing import Any

from peft import PeftConfig, get_peft_config

from hf_devft.configuration import DevFTConfig
from hf_devft.models.streaming import where_from


# All that local training depends on, and nothing that names a file, a program or a place on the network: a server
# cannot make a client read, write or run something else.
SHARED_OPTIONS = (
    "task", "stack", "temporary_head", "federated_method", "federated_method_kwargs", "wire_dtype", "upload_fraction",
    "local_steps", "per_device_train_batch_size", "auto_find_batch_size", "gradient_accumulation_steps",
    "dataloader_drop_last", "max_length", "learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16",
    "activation_checkpointing", "activation_checkpointing_kwargs", "auto_activation_checkpointing",
    "train_sampling_strategy", "length_column_name", "include_num_input_tokens_seen", "seed", "data_seed",
)  # fmt: skip
# Of `from_pretrained`, and their values: where the base comes from is the client's own matter, and other names of an
# attention would be repositories of code.
SHARED_MODEL_OPTIONS = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flex_attention"),
}
# Of a client's own config: it is alone, and neither writes nor shows what a run does.
OWN_OPTIONS = {
    "num_clients": 1, "clients_per_round": 1, "clients_per_batch": 1, "save_strategy": "no", "eval_strategy": "no",
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
# Of an adapter's config; others name files or code, or are of adapters that no stage carries.
_SHARED_ADAPTER_OPTIONS = (
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "target_parameters", "modules_to_save", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "feedforward_modules",
    "init_ia3_weights",
)  # fmt: skip


def check_model_options(options: dict[str, Any]) -> None:
    """Refuse options of loading the base that clients would not have.

    Args:
        options: of `from_pretrained`, as the server has them.

    Raises:
        ValueError: one that is neither told to clients nor about where the base comes from, which is their own matter.
    """
    others = sorted(options.keys() - SHARED_MODEL_OPTIONS.keys() - where_from(options).keys())
    if others:
        raise ValueError(
            f"model_init_kwargs has {', '.join(others)}, which a server does not tell its clients: leave them out, or "
            "let all load a base that was saved so."
        )


def shared_settings(args: DevFTConfig, adapter: PeftConfig) -> str:
    """Write what clients must know of a run, as JSON.

    Args:
        adapter: the config of the full-depth adapter.
    """
    defaults = {item.name: item.default for item in fields(DevFTConfig)}
    options = {name: getattr(args, name) for name in SHARED_OPTIONS}
    options = {name: value for name, value in options.items() if value != defaults[name]}
    model_options = args.model_init_kwargs or {}
    content = {
        "options": options,
        "model_options": {name: _name(model_options[name]) for name in SHARED_MODEL_OPTIONS if name in model_options},
        "adapter": adapter.to_dict(),
    }
    return json.dumps(content, sort_keys=True, default=_plain)


def _name(value: Any) -> str:
    """A type of torch's, or another name, as a name."""
    return str(value).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """Sets as lists, enumerations and types by their names."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", str(value))


def training_options(text: str) -> dict[str, Any]:
    """Read the options of local training of a server's settings, but not the adapter's, which are put in another way
    when a run has begun, nor the task, which the trainer finds out until then.

    Raises:
        ValueError: they are none.
    """
    return {name: value for name, value in _parts(text)[0].items() if name != "task"}


def read_settings(text: str, own: dict[str, Any]) -> tuple[DevFTConfig, PeftConfig]:
    """Read a server's settings: the config of a client's training, and of its adapter.

    Args:
        own: options of the client's own, such as `output_dir`; they stand before the server's.

    Raises:
        ValueError: they have what no server of ours sends.
    """
    options, model_options, adapter = _parts(text)
    unknown = options.keys() - set(SHARED_OPTIONS)
    unknown |= {name for name, value in model_options.items() if value not in SHARED_MODEL_OPTIONS.get(name, ())}
    if unknown:
        raise ValueError(f"the server sets {sorted(unknown)}, which is not a server's to set: use the same version.")
    config = get_peft_config({key: value for key, value in adapter.items() if key in _SHARED_ADAPTER_OPTIONS})
    config.inference_mode = False
    own_model_options = own.pop("model_init_kwargs", None) or {}
    return DevFTConfig(**(options | own), model_init_kwargs=model_options | own_model_options), config


def _parts(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(options, model options, adapter) of a server's settings."""
    try:
        content = json.loads(text)
        return content["options"], content["model_options"], content["adapter"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the server's settings cannot be read: {error}") from error
