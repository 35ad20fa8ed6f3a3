"""What a run is: `DevFTConfig`, what the user says; `StageConfig`, what one stage came to; and what goes with what."""

from hf_devft.configuration.compatibility import check_compatibility
from hf_devft.configuration.devft_config import DevFTConfig
from hf_devft.configuration.facts import Setup
from hf_devft.configuration.stage_config import STAGE_CONFIG_NAME, StageConfig


__all__ = ["STAGE_CONFIG_NAME", "DevFTConfig", "Setup", "StageConfig", "check_compatibility"]
