"""Developmental federated tuning (DevFT, arXiv 2508.00041) for the Hugging Face ecosystem.

Names are imported when they are asked for, so that `devft --help` does not wait for PyTorch; TRL's trainers need the
extra `trl`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_devft.configuration import DevFTConfig, StageConfig
    from hf_devft.run.loading import compare_bases, load_submodel
    from hf_devft.trainer.devft_trainer import DevFTTrainer
    from hf_devft.trainer.mixin import DevFTMixin
    from hf_devft.trainer.trl import DevFTDPOConfig as DevFTDPOConfig
    from hf_devft.trainer.trl import DevFTDPOTrainer as DevFTDPOTrainer
    from hf_devft.trainer.trl import DevFTSFTConfig as DevFTSFTConfig
    from hf_devft.trainer.trl import DevFTSFTTrainer as DevFTSFTTrainer


__version__ = "0.2.0"

# Name -> the module that has it.
_FOUND_IN = {
    "DevFTConfig": "configuration",
    "DevFTMixin": "trainer.mixin",
    "DevFTTrainer": "trainer.devft_trainer",
    "StageConfig": "configuration",
    "compare_bases": "run.loading",
    "load_submodel": "run.loading",
    "DevFTDPOConfig": "trainer.trl",
    "DevFTDPOTrainer": "trainer.trl",
    "DevFTSFTConfig": "trainer.trl",
    "DevFTSFTTrainer": "trainer.trl",
}

# Not TRL's, so that `from hf_devft import *` works without it.
__all__ = ["DevFTConfig", "DevFTMixin", "DevFTTrainer", "StageConfig", "__version__", "compare_bases", "load_submodel"]


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FOUND_IN[name]}"), name)
