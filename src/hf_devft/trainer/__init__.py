"""The only folder that knows transformers' `Trainer`: the loop over stages and rounds, and what it is made of."""

from hf_devft.trainer.devft_trainer import DevFTTrainer


__all__ = ["DevFTTrainer"]
