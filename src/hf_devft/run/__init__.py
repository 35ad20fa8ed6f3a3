"""What a run leaves and shows: checkpoints, artifacts, tables, plots, the plan."""
