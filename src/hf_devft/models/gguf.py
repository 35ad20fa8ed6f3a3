"""A base from a GGUF file, the format of llama.cpp. Its weights are unpacked as it is loaded: packed ones pass no
gradient on, and can neither be compared nor fused."""

from pathlib import Path
from typing import Any

from transformers import GgufConfig, PreTrainedModel
from transformers.utils import is_gguf_available


def locate(name_or_path: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Take the name of a `.gguf` file, such as "folder/file.gguf" or "user/repository/file.gguf", apart into what
    `from_pretrained` takes: the folder or repository, and `gguf_file` among its options. Other names stay."""
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        return name_or_path, options
    return str(path.parent), {"gguf_file": path.name} | options


def load_unpacked(name_or_path: str, auto_class: type, options: dict[str, Any]) -> tuple[PreTrainedModel, dict]:
    """`auto_class.from_pretrained` of a GGUF file, with dense weights; returns the model, named by the file, and what
    was found in it.

    Args:
        options: of `from_pretrained`, `gguf_file` among them.

    Raises:
        ImportError: the library that reads the format is missing.
    """
    if not is_gguf_available():
        raise ImportError("GGUF files cannot be read: pip install 'hf-devft[gguf]', in a clone '.[gguf]'")
    options = {"quantization_config": GgufConfig(dequantize=True)} | options
    model, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    check_unpacked(model)
    # Both, as PEFT and transformers each read their own.
    model.name_or_path = model.config.name_or_path = str(Path(name_or_path, options["gguf_file"]))
    return model, info


def check_unpacked(model: PreTrainedModel) -> None:
    """Make a model whose GGUF weights were unpacked a plain one, in place, as `Trainer` would still take it for a
    quantised one; other models stay.

    Raises:
        ValueError: its weights are packed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not isinstance(quantizer.quantization_config, GgufConfig):
        return
    if not quantizer.quantization_config.dequantize:
        raise ValueError(
            "the base was loaded from a GGUF file with its weights packed, which cannot be trained on: load it with "
            "`quantization_config=GgufConfig(dequantize=True)`, or give the file's path."
        )
    quantizer.remove_quantization_config(model)
