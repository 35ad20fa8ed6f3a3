"""Load any stage's adapter with plain PEFT and ask it something: nothing of ours is imported.

python examples/load_stage.py outputs/quickstart/stage-3 "Move the first word to the end: red cat milk"
"""

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


folder, question = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(f"{question}\nAnswer:", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
