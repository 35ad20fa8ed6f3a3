"""What a resumed run must have in common with the one that it continues."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.federation.memory import SERVER
from hf_devft.federation.partition import ClientData
from hf_devft.models.initialisation import moves_weights
from hf_devft.models.layout import State


_RULES = ("grouping", "fusion", "fusion_beta", "transfer", "stack", "temporary_head")
_FEDERATION = (
    "federated_method", "federated_method_kwargs", "wire_dtype", "upload_fraction", "client_selection",
    "client_selection_kwargs", "client_max_layers", "client_resources", "beyond_capacity", "clients_per_round",
    "local_steps", "seed", "data_seed",
)  # fmt: skip
_ANSWERING = ("calibration_samples", "generation_max_new_tokens")
_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern")
_WHO_HAS_WHAT = "clients and their rows (checksum)"
_NEW = ("lora_r", *_SCALES, _WHO_HAS_WHAT)  # which earlier checkpoints do not tell


def run_setting(
    args: DevFTConfig,
    stages: Sequence[StageConfig],
    adapter: PeftConfig,
    clients: ClientData,
    noise_multiplier: float | None,
) -> dict[str, Any]:
    """Collect what a resumed run must have in common with this one: {what: its value}.

    Args:
        noise_multiplier: of a private run, which its rounds so far are accounted for by; or None.
    """

    def of(*options: str) -> list[Any] | None:
        """The values of options of which the first turns the others on."""
        return [getattr(args, option) for option in options] if getattr(args, options[0]) else None

    setting = {option: getattr(args, option) for option in (*_RULES, *_FEDERATION)} | {
        "adapter_fusion": args.fuses_adapters_by,
        "stage_layers": [stage.num_layers for stage in stages],
        "adapter_layers": [stage.adapted for stage in stages] if args.adapter_layers else None,
        "lora_r": getattr(adapter, "r", None),
        "lora_alpha": getattr(adapter, "lora_alpha", None),
        **{option: getattr(adapter, option, None) for option in _SCALES},
        "init_lora_weights": getattr(adapter, "init_lora_weights", None) if moves_weights(adapter) else None,
        "distillation": of("distillation_steps", *_ANSWERING),
        "bridged on": args.calibration_samples if args.fusion == "bridge" else None,
        "healing": of("healing_steps", "healing_learning_rate", *_ANSWERING),
        "differential privacy": [
            args.dp_noise_multiplier,
            args.dp_target_epsilon,
            args.dp_delta,
            args.dp_clipping_norm,
            args.dp_sampling,
            *([args.dp_level, args.train_batch_size] if args.protects_records else []),
            # Found for the budget, by the rounds, `max_steps` and what clients can hold.
            *([] if noise_multiplier in (None, args.dp_noise_multiplier) else [f"noise {noise_multiplier:.6g}"]),
        ]
        if args.is_private
        else None,
        "num_clients": len(clients.rows),
    }
    if not args.is_private:  # in a private run it would tell who they are, and how many rows there are
        setting["clients elsewhere"] = clients.names if clients.elsewhere is not None else None
        setting[_WHO_HAS_WHAT] = clients.digest()[:16]
    if clients.elsewhere is not None:  # each client says for itself what it has and can hold, when it joins
        setting |= dict.fromkeys(("client_max_layers", _WHO_HAS_WHAT))
    return setting


def check_same_setting(saved: dict[str, Any], setting: dict[str, Any], folder: str | Path) -> None:
    """Refuse a checkpoint in `folder` of another run.

    Raises:
        ValueError: says what differs.
    """
    wanted = json.loads(json.dumps(setting))  # lists for tuples, as saved
    saved = {name: wanted[name] for name in _NEW if name in wanted} | saved
    differing = [
        f"{name} {saved.get(name)} (now {wanted[name]})" for name in wanted if saved.get(name) != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"{folder} is of a run with {', '.join(differing)}: resume with the same, or start anew in another "
            "`output_dir`."
        )


def changed_stages(before: Sequence[StageConfig], now: Sequence[StageConfig]) -> str:
    """Say what is asked of stages that was not asked of them before; empty where nothing is."""
    return ", ".join(
        f"{name} {getattr(old, name)} → {getattr(new, name)} in stage {new.stage}"
        for old, new in zip(before, now, strict=True)
        for name in ("rounds", "learning_rate")
        if getattr(old, name) != getattr(new, name)
    )


def check_same_adapter(adapter: State, own: State, where: str = "") -> None:
    """Refuse an adapter that has other tensors than the run's own.

    Args:
        where: the adapter is, as an error has it.

    Raises:
        ValueError: names or shapes differ.
    """
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (adapter, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the adapter{where} is not one of this base and LoRA config: names or shapes differ. Resume with the "
            "same."
        )


def check_same_memory(memory: State, num_clients: int, adapter: State, folder: str | Path) -> None:
    """Refuse what outlives a round, read from a checkpoint in `folder`, where it is of other clients or of another
    adapter.

    Args:
        memory: see `Memory.state_dict`. adapter: at the depth that it was kept at.

    Raises:
        ValueError: says what.
    """
    for path, tensor in memory.items():
        owner, _, rest = path.partition("/")
        key = rest.partition("/")[2]
        known = owner == SERVER or (owner.isdecimal() and int(owner) < num_clients)
        if not known or not key or (key in adapter and tensor.shape != adapter[key].shape):
            raise ValueError(
                f"{folder} has kept {path!r} of shape {tuple(tensor.shape)}, which is of none of the {num_clients} "
                "clients, or of another adapter: resume from another checkpoint."
            )
