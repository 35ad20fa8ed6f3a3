import torch
from conftest import tiny_llama

from hf_devft.tasks.data import tokenize
from hf_devft.tasks.generation import generate_answers


def test_answers_are_those_of_one_prompt_at_a_time(tokenizer, eval_tasks):
    model, rows = tiny_llama(), tokenize(eval_tasks, tokenizer, 128)
    answers, references = generate_answers(model, tokenizer, rows, max_new_tokens=5, batch_size=5)
    assert references == eval_tasks["completion"][:]
    for row, answer in zip(eval_tasks, answers, strict=True):
        prompt = torch.tensor([tokenizer(row["prompt"]).input_ids])
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, pad_token_id=1
        )
        assert tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True) == answer
