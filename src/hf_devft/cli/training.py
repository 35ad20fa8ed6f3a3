"""Trains, or plans, what a config and flags say."""

import json
import sys
from collections.abc import Sequence

import datasets
from transformers.utils import logging

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.errors import one_line_errors
from hf_devft.cli.recipe import make_plan, make_trainer
from hf_devft.cli.running import stopping_between_rounds
from hf_devft.cli.summary import closing, say, say_at_start
from hf_devft.run.claim import check_free
from hf_devft.run.plan_table import print_plan
from hf_devft.tasks.data import check_files


def train_or_plan(argv: Sequence[str]) -> None:
    """Train, or with `--plan` say what it would cost.

    Args:
        argv: see `parse_arguments`.
    """
    logging.disable_progress_bar()  # the run has one bar and one table of its own
    with one_line_errors("--traceback" in argv):
        recipe, args = parse_arguments(argv)
    with one_line_errors(recipe.traceback):
        if not (recipe.train_file or recipe.dataset_name):
            datasets.disable_progress_bars()  # made-up tasks are encoded at once
        if recipe.plan or recipe.plan_json:
            plan = make_plan(recipe, args)
            name = f"{recipe.model_name_or_path}, {args.federated_method}: what a run will cost"
            print(json.dumps(plan.to_dict(), indent=2)) if recipe.plan_json else print_plan(plan, name)
            sys.exit()
        for files in (recipe.train_file, recipe.eval_file, recipe.calibration_file):
            check_files(files or [])
        check_free(args)
        trainer = make_trainer(recipe, args)
        say_at_start(trainer)
        with stopping_between_rounds(trainer):
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        if trainer.is_world_process_zero():
            say(closing(trainer))
