"""What the server teaches: a submodel, to stand for all layers (healing); a larger one, what the smaller has learned."""
