"""Merge a stage's adapter into the base: a plain transformers model, to be loaded without PEFT and this package.

python examples/merge_and_save.py outputs/quickstart/stage-3 merged
"""

import argparse

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stage", help="its folder, or a name on the Hub")
parser.add_argument("target", help="folder to write")
args = parser.parse_args()
# In single precision: rounded to bfloat16, small changes of large weights would be lost.
AutoPeftModelForCausalLM.from_pretrained(args.stage, dtype="float32").merge_and_unload().save_pretrained(args.target)
AutoTokenizer.from_pretrained(args.stage).save_pretrained(args.target)
