"""Public benchmarks of a stage: what `devft evaluate` does.

python recipes/evaluate_stage.py --run outputs/quickstart --stage 2 --tasks mmlu truthfulqa_mc2 bbh ifeval
"""

import sys

from hf_devft.cli.evaluate import main


if __name__ == "__main__":
    main(sys.argv[1:])
