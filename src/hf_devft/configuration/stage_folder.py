"""The names of what a run's folder, a finished stage's, or a checkpoint holds beside the adapter."""

from hf_devft.configuration.stage_config import STAGE_CONFIG_NAME
from hf_devft.federation.privacy.secret import SECRET


SUBMODEL = "submodel"  # folder of the compact adapter, as it travelled
PLOT = "loss.png"
LEDGER = "ledger.json"
FEDERATION = "federation.safetensors"  # what stays with the clients: never pushed
CLIENTS = "clients"  # folder of what clients keep that are simulated: never pushed


__all__ = ["CLIENTS", "FEDERATION", "LEDGER", "PLOT", "SECRET", "STAGE_CONFIG_NAME", "SUBMODEL"]
