"""Load a base whose layers stay in its checkpoint until a submodel needs them.

The full model is never held for a stage that trains four of its layers: similarity and fusion read one parameter name
at a time (see `weights.dense`), and only a stage's representative layers are kept.
"""

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_devft.models.gguf import load_unpacked, locate
from hf_devft.models.layer_stack import LayerNames, find_layer_stack
from hf_devft.models.weights import Stored


def load_base(
    name_or_path: str,
    auto_class: type = AutoModelForCausalLM,
    which: str | None = None,
    whole: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, with the layers left in the checkpoint: on the meta device, and read by
    `dense`.

    Loaded at once instead: a base that is quantised (its layers must be seen to be packed), one from a GGUF file, one
    that DeepSpeed ZeRO-3 cuts while it loads, and one for which a `device_map` was given.

    Args:
        name_or_path: a Hub name or a folder; or a `.gguf` file, see `locate`.
        auto_class: of transformers. which: see `find_layer_stack`. whole: whether to load everything at once.
        options: of `from_pretrained`.

    Returns:
        The model; `model.missing_modules` names the modules that the checkpoint does not have.
    """
    name_or_path, options = locate(name_or_path, options)
    if "gguf_file" in options:
        return _with_missing_modules(*load_unpacked(name_or_path, auto_class, options))
    config = _config(name_or_path, options)
    quantized = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if whole or quantized or is_deepspeed_zero3_enabled() or "device_map" in options:
        return _with_missing_modules(*auto_class.from_pretrained(name_or_path, output_loading_info=True, **options))
    names = find_layer_stack(skeleton := empty_base(name_or_path, auto_class, **options), which).names
    # Only for checkpoints whose weights are not stored as the model has them (pickled ones, some mixtures of experts).
    folder = tempfile.TemporaryDirectory(prefix="hf-devft-")
    with _quiet("accelerate.big_modeling"):
        model, info = auto_class.from_pretrained(
            name_or_path,
            device_map=_device_map(skeleton, names),
            offload_folder=folder.name,
            output_loading_info=True,
            **options,
        )
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    weights = next(hook.weights_map.dataset for hook in hooks if hook.offload)
    remove_hook_from_submodules(model)
    del model.hf_device_map
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            parameter.stored = Stored(weights, name, folder)
    return _with_missing_modules(model, info)


def _with_missing_modules(model: PreTrainedModel, info: dict[str, Any]) -> PreTrainedModel:
    others = (key for key, *_ in info["mismatched_keys"])  # `ignore_mismatched_sizes`
    model.missing_modules = {key.rpartition(".")[0] for key in (*info["missing_keys"], *others)}
    return model


def empty_base(name_or_path: str, auto_class: type = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The model without its weights, on the meta device; nothing but the config is read.

    Args:
        name_or_path, options: as for `load_base`; a quantisation is left to who needs to know of it.
    """
    config = _config(*locate(name_or_path, options))
    dtype = options.get("dtype", "auto")
    with init_empty_weights():
        model = auto_class.from_config(
            config,
            dtype=config.dtype if dtype == "auto" else dtype,
            trust_remote_code=options.get("trust_remote_code", False),
        )
    model.tie_weights()
    return model


def empty_copy(base: PreTrainedModel) -> PreTrainedModel:
    """The same model without its weights, on the meta device, with an attention that needs no GPU."""
    with init_empty_weights():
        model = type(base)(copy.deepcopy(base.config)).to(base.dtype)
    if getattr(base.config, "_attn_implementation", "eager") != "eager":  # transformers has no public name for it
        model.set_attn_implementation("sdpa")
    model.tie_weights()
    return model


def _config(name_or_path: str, options: dict[str, Any]) -> PretrainedConfig:
    head = {name: options[name] for name in ("num_labels", "id2label", "label2id") if name in options}
    try:
        return options.get("config") or AutoConfig.from_pretrained(name_or_path, **where_from(options), **head)
    except OSError as error:  # no network, no such name, no permission
        why = error if _may_be_on_the_hub(name_or_path) else "there is no such folder, and no such name on the Hub"
        raise OSError(f"the model {name_or_path} cannot be loaded: {why}") from error


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return Path(name).exists()  # a folder, whose own error says what it lacks
    return True


def where_from(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that say where files come from; tokenizers and configs take them too."""
    names = (
        "revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies",
        "trust_remote_code", "code_revision", "gguf_file",
    )  # fmt: skip
    return {name: options[name] for name in names if name in options}


def _device_map(skeleton: PreTrainedModel, names: LayerNames) -> dict[str, str]:
    """Layers "on disk", everything else in memory."""
    leaves = [name for name, module in skeleton.named_modules() if not list(module.children())]
    own = [  # tensors of modules with children, such as an image encoder's class token
        f"{name}.{tensor}".removeprefix(".")
        for name, module in skeleton.named_modules()
        if list(module.children())
        for tensor in (*module._parameters, *module._buffers)
    ]
    stacks = tuple(f"{path}." for path in names.lists)
    outside = [name for name in (*leaves, *own) if not f"{name}.".startswith(stacks)]
    return dict.fromkeys(outside, "cpu") | dict.fromkeys(names.lists, "disk")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of a library's logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
