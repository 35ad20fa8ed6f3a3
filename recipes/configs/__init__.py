"""The configs that come with the package, as `hf_devft.configs`: `devft train --config NAME`."""
