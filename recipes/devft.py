"""Developmental federated tuning, from a config.

    accelerate launch recipes/devft.py                                    # the quickstart
    accelerate launch recipes/devft.py --config recipes/configs/fedit.yaml --seed 1 --output_dir outputs/fedit

    accelerate launch recipes/devft.py --resume_from_checkpoint last      # starts a run, or goes on with it
    python recipes/devft.py --plan                                        # what it will cost, without any weights

Every key of a config is also a flag. Without data files, the tasks are made up by the package's generator.
"""

import json
import sys
from pathlib import Path

import datasets
from transformers.utils import logging

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import make_plan, make_trainer
from hf_devft.cli.running import one_line_errors, stopping_between_rounds
from hf_devft.run.plan_table import print_plan


QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


if __name__ == "__main__":
    logging.disable_progress_bar()  # the run has one bar and one table of its own
    with one_line_errors("--traceback" in sys.argv):
        recipe, args = parse_arguments(sys.argv[1:], QUICKSTART)
        if not (recipe.train_file or recipe.dataset_name):
            datasets.disable_progress_bars()  # made-up tasks are encoded at once
        if recipe.plan or recipe.plan_json:
            plan = make_plan(recipe, args)
            print(json.dumps(plan.to_dict(), indent=2)) if recipe.plan_json else print_plan(plan)
            sys.exit()
        trainer = make_trainer(recipe, args)
        with stopping_between_rounds(trainer):
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        if trainer.is_world_process_zero():
            print(f"Adapters, model card and plot are in {trainer.args.output_dir}/")
