"""Developmental federated tuning (DevFT, arXiv 2508.00041) for the Hugging Face ecosystem."""

from hf_devft.configuration import DevFTConfig, StageConfig
from hf_devft.loading import compare_bases, load_submodel
from hf_devft.mixin import DevFTMixin
from hf_devft.trainer import DevFTTrainer
from hf_devft.version import __version__


__all__ = ["DevFTConfig", "DevFTMixin", "DevFTTrainer", "StageConfig", "__version__", "compare_bases", "load_submodel"]


def __getattr__(name: str):
    """TRL's trainers, which need the extra `trl`, are imported when they are asked for."""
    if name in ("DevFTDPOConfig", "DevFTDPOTrainer", "DevFTSFTConfig", "DevFTSFTTrainer"):
        from hf_devft import trl_trainers

        return getattr(trl_trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
