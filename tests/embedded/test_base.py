import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_devft.embedded import BASE_PATH


def test_the_base_is_small_and_deep():
    assert (BASE_PATH / "model.safetensors").stat().st_size <= 8_000_000
    config = AutoConfig.from_pretrained(BASE_PATH)
    assert config.num_hidden_layers == 16
    assert config.model_type == "llama"
    # Stored in bfloat16, which many CPUs compute in slowly.
    assert AutoModelForCausalLM.from_pretrained(BASE_PATH).dtype == torch.float32


def test_any_text_encodes():
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    for text in ("Hello, 42!", "naïve ☃ 数学\n\t", "\x00"):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_the_chat_template_marks_the_assistants_tokens():
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Hello<|endoftext|>"


def test_it_was_trained():
    """It answers a family that it has seen; a random init has no chance of it."""
    tokenizer, model = AutoTokenizer.from_pretrained(BASE_PATH), AutoModelForCausalLM.from_pretrained(BASE_PATH)
    prompt = tokenizer("Repeat these words: red cat milk\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == " red cat milk"
