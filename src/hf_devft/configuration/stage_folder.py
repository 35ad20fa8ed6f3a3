"""The names of what a finished stage's folder, or a checkpoint, holds beside the adapter."""

from hf_devft.configuration.stage_config import STAGE_CONFIG_NAME


SUBMODEL = "submodel"  # folder of the compact adapter, as it travelled
PLOT = "loss.png"
LEDGER = "ledger.json"
FEDERATION = "federation.safetensors"  # what stays with the clients: never pushed


__all__ = ["FEDERATION", "LEDGER", "PLOT", "STAGE_CONFIG_NAME", "SUBMODEL"]
