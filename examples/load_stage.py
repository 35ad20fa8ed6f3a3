"""Load any stage's adapter with plain PEFT and ask it something: nothing of ours is imported.

python examples/load_stage.py outputs/quickstart/stage-3 "Move the first word to the end: red cat milk"
"""

import argparse

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="of a stage")
parser.add_argument("question", help="what to ask it")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.folder)
model = AutoPeftModelForCausalLM.from_pretrained(args.folder)
inputs = tokenizer(f"{args.question}\nAnswer:", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
