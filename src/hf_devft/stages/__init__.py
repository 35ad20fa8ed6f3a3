"""From the full model to a stage's submodel, and back. Pure functions; knows neither trainer nor files."""
