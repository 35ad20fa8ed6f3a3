"""By what two machines know that they train the same submodel."""

import hashlib

import torch

from hf_devft.trainer.active_stage import ActiveStage


def hash_of_weights(active: ActiveStage) -> str:
    """Return a hash of a stage's base weights, without its adapter: of their names, types, shapes and bytes."""
    digest, own = hashlib.sha256(), {id(parameter) for parameter in active.engine.parameters}
    for name, parameter in sorted(active.model.named_parameters()):
        if id(parameter) not in own:
            values = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
