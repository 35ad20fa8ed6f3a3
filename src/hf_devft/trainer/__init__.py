"""The only folder that knows transformers' `Trainer`: the loop over stages and rounds, and what it is made of."""
