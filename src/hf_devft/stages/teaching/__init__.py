"""What the server teaches: submodels to stand for all layers (healing), larger ones what smaller ones have learned."""
