"""Merge a stage's adapter into the base: a plain transformers model, to be loaded without PEFT and this package.

python examples/merge_and_save.py outputs/quickstart/stage-3 merged
"""

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


stage, target = sys.argv[1:3]
# In single precision: rounded to bfloat16, small changes of large weights would be lost.
AutoPeftModelForCausalLM.from_pretrained(stage, dtype="float32").merge_and_unload().save_pretrained(target)
AutoTokenizer.from_pretrained(stage).save_pretrained(target)
