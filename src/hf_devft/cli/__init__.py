"""The command line: a recipe's arguments, from a YAML file and flags."""
