"""Developmental federated tuning, from a config: what `devft train` does, for `accelerate launch`.

    accelerate launch recipes/devft.py                                    # the quickstart
    accelerate launch recipes/devft.py --config recipes/configs/fedit.yaml --seed 1 --output_dir outputs/fedit

    accelerate launch recipes/devft.py --resume_from_checkpoint last      # starts a run, or goes on with it
    python recipes/devft.py --plan                                        # what it will cost, without any weights

Every key of a config is also a flag. Without data files, the tasks are made up by the package's generator.
"""

import sys

from hf_devft.cli.train import main


if __name__ == "__main__":
    main(sys.argv[1:])
