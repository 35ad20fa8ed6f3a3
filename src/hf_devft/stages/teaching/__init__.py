"""What the server teaches: submodels, to stand for all layers (healing), and to know what smaller ones have learned."""
