"""Developmental federated tuning (DevFT, arXiv 2508.00041) for the Hugging Face ecosystem."""

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.run.loading import compare_bases, load_submodel
from hf_devft.trainer.devft_trainer import DevFTTrainer
from hf_devft.trainer.mixin import DevFTMixin


__version__ = "0.2.0"

__all__ = ["DevFTConfig", "DevFTMixin", "DevFTTrainer", "StageConfig", "__version__", "compare_bases", "load_submodel"]


def __getattr__(name: str):
    """TRL's trainers, which need the extra `trl`, are imported when they are asked for."""
    if name in ("DevFTDPOConfig", "DevFTDPOTrainer", "DevFTSFTConfig", "DevFTSFTTrainer"):
        from hf_devft.trainer import trl

        return getattr(trl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
