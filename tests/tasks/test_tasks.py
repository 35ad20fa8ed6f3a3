"""Rows as users have them, through a run by name."""

import json
import re

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import config, lora
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from PIL import Image
from test_models import ENCODER, SIZES, WAVES, WHISPER

from hf_devft import DevFTTrainer, load_submodel
from hf_devft.embedded import BASE_PATH
from hf_devft.federation.heterogeneity.label_features import label_counts
from hf_devft.federation.partition import from_mapping
from hf_devft.tasks import TASKS, Encoding, label_options, task_of
from hf_devft.tasks.data import load_files, to_known_columns
from hf_devft.tasks.task import SoundCollator


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    """A checkpoint with the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = ENCODER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    hf.BertForMaskedLM(hf.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model, folder, rows, adapter, **kwargs) -> DevFTTrainer:
    passed = {name: kwargs.pop(name) for name in ("processing_class", "compute_loss_func") if name in kwargs}
    sizes = {"stage_rounds": [1], "local_steps": 1, "num_clients": 2, "max_length": 16}
    trainer = DevFTTrainer(
        model, config(folder, **sizes | kwargs), peft_config=adapter, train_dataset=rows,
        eval_dataset=rows.select(range(4)), **passed,
    )  # fmt: skip
    trainer.train()
    return trainer


SENTENCES = [f"row {number} is {'good' if number % 3 else 'bad'}" for number in range(24)]


def test_text_classification_by_name_learns_the_labels_of_the_data(bert, tmp_path):
    rows = Dataset.from_dict({"sentence": SENTENCES, "label": [["bad", "so-so", "good"][n % 3] for n in range(24)]})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = run(bert, tmp_path, rows, adapter)
    model = trainer.model.get_base_model()
    assert type(model) is hf.BertForSequenceClassification
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    assert "bert.pooler.dense" in trainer.peft_config.modules_to_save, "the checkpoint has none: it would be random"
    card = (tmp_path / "README.md").read_text()
    labels = "id2label={0: 'bad', 1: 'good', 2: 'so-so'}, ignore_mismatched_sizes=True"
    assert f'AutoPeftModelForSequenceClassification.from_pretrained("{tmp_path}", {labels})' in card
    assert "pipeline_tag: text-classification" in card
    assert load_submodel(bert, tmp_path, stage=1).config.id2label == model.config.id2label
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_row_without_its_label_is_named(bert, tmp_path):
    rows = Dataset.from_dict({"text": SENTENCES, "label": ["good", None, "bad"] * 8})
    with pytest.raises(ValueError, match="row 2 of the data has no `label`"):
        run(bert, tmp_path, rows, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))


def test_a_classifier_of_the_embedded_base_is_loaded_as_its_card_says(tmp_path):
    rows = Dataset.from_dict({"text": SENTENCES, "label": ["bad", "so-so", "good"] * 8})
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    trainer = run("embedded", tmp_path, rows, adapter, stage_layers=[2, 16])
    loads, _ = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    there: dict = {}
    exec(loads, there)
    assert there["model"].config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(there["model"].eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_head_that_was_trained_keeps_its_labels(bert, tmp_path, tokenizer):
    names = {0: "so-so", 1: "good", 2: "bad"}
    trained = hf.BertForSequenceClassification.from_pretrained(bert, id2label=names)
    trained.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    rows = Dataset.from_dict({"text": SENTENCES, "label": ["bad", "good"] * 12})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = run(str(tmp_path / "trained"), tmp_path / "run", rows, adapter)
    assert trainer.model.config.id2label == names
    assert trainer.train_dataset["labels"][:2] == [2, 1]


def test_a_private_run_publishes_no_labels_that_rows_tell(bert, tmp_path):
    rows = Dataset.from_dict({"text": SENTENCES, "label": ["no", "yes"] * 12})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    private = {"dp_noise_multiplier": 1.0, "dp_clipping_norm": 1.0, "dp_delta": 1e-3}
    with pytest.raises(ValueError, match=r"published without noise: name them, as by .*id2label.*ClassLabel"):
        run(bert, tmp_path, rows, adapter, **private)
    names = {"id2label": {"0": "maybe", "1": "no", "2": "yes"}}
    trainer = run(bert, tmp_path, rows, adapter, **private, model_init_kwargs=names)
    config = trainer.model.get_base_model().config
    assert config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert config.label2id == {"maybe": 0, "no": 1, "yes": 2}
    assert trainer.train_dataset["labels"][:2] == [1, 2]
    numbers = Dataset.from_dict({"text": SENTENCES, "label": [0, 1] * 12})
    trainer = run(bert, tmp_path, numbers, adapter, **private, model_init_kwargs={"num_labels": 3})
    assert trainer.model.get_base_model().config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize("order", [["bad", "good"], ["good", "bad"]])
def test_a_columns_numbers_go_to_a_trained_head_by_their_names(bert, tmp_path, tokenizer, order):
    names = {0: "bad", 1: "good"}
    trained = hf.BertForSequenceClassification.from_pretrained(bert, id2label=names)
    trained.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    rows = Dataset.from_dict({"text": SENTENCES, "label": ["bad", "good"] * 12})
    rows = rows.cast_column("label", ClassLabel(names=order))
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = run(str(tmp_path / "trained"), tmp_path / "run", rows, adapter)
    assert trainer.model.config.id2label == names
    assert trainer.train_dataset["labels"][:2] == [0, 1]


def test_a_loss_that_ignores_the_number_of_items_is_not_cut(bert, tmp_path):
    rows = Dataset.from_dict({"text": SENTENCES, "label": [0, 1] * 12})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="uneven parts"):
        run(bert, tmp_path, rows, adapter, auto_find_batch_size=True)


@pytest.mark.parametrize("method", ["c2a", "dofit"])
def test_labels_of_rows_held_out_count_for_nobody(tasks, tmp_path, method):
    trainer = DevFTTrainer(
        "embedded", config(tmp_path, stage_layers=[2, 16], client_eval_size=0.5, federated_method=method),
        peft_config=lora(), train_dataset=tasks,
    )  # fmt: skip
    rows = np.concatenate([*trainer.clients.rows.values()])
    trained = sum(label != -100 for labels in trainer.train_dataset.select(rows)["labels"] for label in labels)
    assert label_counts(trainer.train_dataset, list(trainer.clients.rows.values())).sum() == trained


def test_the_best_round_of_several_evaluation_sets(tasks, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = DevFTTrainer(
        "embedded",
        config(tmp_path, stage_layers=[2, 16], client_eval_size=0.2, load_best_model_at_end=True, **options),
        peft_config=lora(), train_dataset=tasks,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None


def test_pairs_of_sentences(bert, tmp_path, tokenizer):
    rows = Dataset.from_dict({"premise": SENTENCES, "hypothesis": SENTENCES[::-1], "label": [0, 1] * 12})
    trainer = run(
        bert, tmp_path, rows, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"), max_length=32
    )
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert SENTENCES[0] in text
    assert SENTENCES[23] in text


def test_each_words_first_token_carries_its_tag(bert, tmp_path, tokenizer):
    names = ["O", "B-NAME", "I-NAME"]
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))})
    row = {"tokens": ["unbelievably", "Ann", "Lee"], "ner_tags": [0, 1, 2]}
    rows = Dataset.from_list([row] * 24, features=features)
    adapter = LoraConfig(r=2, target_modules=["query", "value"], task_type="TOKEN_CLS")
    trainer = run(bert, tmp_path, rows, adapter)
    assert trainer.model.config.id2label == dict(enumerate(names))
    row = trainer.train_dataset[0]
    assert [label for label in row["labels"] if label != -100] == [0, 1, 2]
    assert row["labels"][1] == -100, "the first word has several tokens"


def test_text_to_text(tmp_path, tokenizer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    rows = Dataset.from_dict({"question": SENTENCES, "answer": SENTENCES})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    trainer = run(model, tmp_path, rows, adapter, stage_layers=[4], processing_class=tokenizer)
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("Question: row 0 is")
    for option in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": sum}):
        with pytest.raises(ValueError, match="takes the labels out of a batch, and the decoder reads them"):
            run(model, tmp_path / "labels", rows, adapter, stage_layers=[4], processing_class=tokenizer, **option)


def test_outputs_that_no_metric_takes_are_left_out_of_every_evaluation(tmp_path, tokenizer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    rows = Dataset.from_dict({"question": SENTENCES, "answer": SENTENCES})
    trainer = DevFTTrainer(
        model,
        config(tmp_path, stage_layers=[4, 6], stage_rounds=[1], local_steps=1, num_clients=2, max_length=16),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"width": found.predictions.shape[-1]},
    )
    trainer.train(ignore_keys_for_eval=["encoder_last_hidden_state", "cache"])
    assert [stage.metrics["eval_full_width"] for stage in trainer.stages] == [len(tokenizer)] * 2


def test_images(tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))
    images = [Image.fromarray(np.full((10, 10), 9 * number, np.uint8)) for number in range(24)]
    rows = Dataset.from_dict({"img": images, "label": [0, 1] * 12}).cast_column("img", hf_image())
    processor = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    adapter = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    trainer = run(model, tmp_path, rows, adapter, processing_class=processor)
    assert np.shape(trainer.train_dataset[0]["pixel_values"]) == (3, 8, 8)
    assert trainer.ledger.rounds[0].tokens == 2 * 4 * 5, "4 patches and the class token, of 4 images of 2 clients"


def test_lengths_that_rows_do_not_have_are_missed_before_the_run(tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    rows = Dataset.from_dict({"pixel_values": np.zeros((24, 3, 8, 8)).tolist(), "labels": [0, 1] * 12})
    with pytest.raises(ValueError, match="needs a column 'length' or \"input_ids\""):
        DevFTTrainer(
            hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4)),
            config(tmp_path, train_sampling_strategy="group_by_length", num_clients=2),
            peft_config=LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]),
            train_dataset=rows,
        )


def hf_image():
    from datasets import Image as ImageFeature

    return ImageFeature()


def sounds(**columns) -> Dataset:
    rng = np.random.default_rng(0)
    clips = [{"array": rng.normal(size=200 + 10 * number), "sampling_rate": 16000} for number in range(24)]
    return Dataset.from_dict({"audio": clips} | columns)


def test_sound_classification(tmp_path):
    model = hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**ENCODER, **WAVES))
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["projector", "classifier"])
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    trainer = run(model, tmp_path, sounds(label=[0, 1] * 12), adapter, processing_class=extractor)
    assert trainer.ledger.rounds[0].flops > 0


def test_speech_recognition(tmp_path, tokenizer):
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER | {"vocab_size": len(tokenizer)}))
    extractor = hf.WhisperFeatureExtractor(feature_size=4, chunk_length=1, n_fft=64, hop_length=1000)
    processor = hf.WhisperProcessor(extractor, tokenizer)
    rows, adapter = sounds(sentence=SENTENCES), LoraConfig(r=2, target_modules=["q_proj"])
    trainer = run(model, tmp_path, rows, adapter, stage_layers=[2, 6], processing_class=processor)
    assert tokenizer.decode(trainer.train_dataset[0]["labels"]) == SENTENCES[0]


def test_a_sound_that_is_longer_than_the_model_hears_is_refused(tokenizer):
    """Its text would be learned from what is not heard."""
    extractor = hf.WhisperFeatureExtractor(feature_size=4, chunk_length=1, n_fft=64, hop_length=1000)
    encoding = Encoding(hf.WhisperProcessor(extractor, tokenizer), hf.WhisperConfig(**WHISPER), 16)
    long = Dataset.from_dict({"audio": [{"array": np.zeros(32000), "sampling_rate": 16000}], "text": [SENTENCES[0]]})
    with pytest.raises(ValueError, match="a sound of 2 seconds is longer than the 1 that the model hears"):
        TASKS["automatic-speech-recognition"].encode(long, encoding)


def test_a_head_of_another_size_is_trained_whole(tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))
    model.save_pretrained(tmp_path / "base")
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    images = [Image.fromarray(np.full((10, 10, 3), 9 * number, np.uint8)) for number in range(24)]
    rows = Dataset.from_dict({"image": images, "label": ["a", "b", "c"] * 8}).cast_column("image", hf_image())
    options = {"task": "image-classification", "model_init_kwargs": {"ignore_mismatched_sizes": True}}
    trainer = run(
        str(tmp_path / "base"), tmp_path / "run", rows, LoraConfig(r=2, target_modules="all-linear"), **options
    )
    assert trainer.peft_config.modules_to_save == ["classifier"]
    images = torch.zeros(1, 3, 8, 8)
    loaded = load_submodel(str(tmp_path / "base"), tmp_path / "run", stage=1)
    assert loaded(images).logits.shape == (1, 3)
    imports, load = TASKS["image-classification"].snippet(str(tmp_path / "base"), ["a", "b", "c"])
    there: dict = {}
    exec(f"{imports}\n{load}".replace("LOCATION", f"{str(tmp_path / 'run')!r}"), there)
    torch.testing.assert_close(there["model"].eval()(images).logits, trainer.model.eval()(images).logits)


def test_a_start_that_the_model_adds_is_not_learned():
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    collator = SoundCollator(extractor, start=3)
    batch = collator([
        {"input_values": [0.0] * 5, "labels": [3, 7, 8]}, {"input_values": [0.0] * 9, "labels": [3, 7]},
    ])  # fmt: skip
    assert batch["labels"].tolist() == [[7, 8], [7, -100]]
    assert batch["input_values"].shape == (2, 9)


def test_labels_of_numbers_reach_from_zero():
    rows = Dataset.from_dict({"label": [0, 3], "tags": [[0, 1], [2]]})
    assert label_options(rows, "label")["num_labels"] == 4
    assert label_options(rows, "tags")["num_labels"] == 3


@pytest.mark.parametrize(("labels", "kinds"), [([0.5, 1.0], "float"), ([None, None], "nothing"), ([-1, 0], "int")])
def test_labels_that_are_no_classes_are_an_error(labels, kinds):
    with pytest.raises(ValueError, match=f"column 'label' holds {kinds}"):
        label_options(Dataset.from_dict({"label": labels}), "label")


def test_a_label_that_the_model_does_not_have_is_an_error(bert, tmp_path, tokenizer):
    model = hf.BertForSequenceClassification.from_pretrained(bert, num_labels=2)
    rows = Dataset.from_dict({"text": SENTENCES, "label": [0, 1, 2] * 8})
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="2 is not one of the model's 2 labels"):
        run(model, tmp_path, rows, adapter, processing_class=tokenizer)


def test_columns_that_a_task_lacks_are_named(tmp_path):
    with pytest.raises(ValueError, match="prompt and answer"):
        TASKS["text2text-generation"].to_columns(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="QUESTION_ANS"):
        task_of(None, "QUESTION_ANS")
    for task, names in {
        "text-classification": "text or sentence", "token-classification": "tokens or words",
        "image-classification": "image", "automatic-speech-recognition": "audio",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=names):
            TASKS[task].to_columns(Dataset.from_dict({"body": ["a"]}))


def test_the_task_is_what_someone_says():
    bert = hf.BertForTokenClassification(hf.BertConfig(**ENCODER))
    assert task_of(bert, None) == "token-classification"
    assert task_of(bert, "SEQ_CLS") == "text-classification"
    assert task_of(bert, "SEQ_CLS", "image-classification") == "image-classification"
    assert task_of(None, None) == "text-generation"


CHAT = [
    {"role": "user", "content": "red?"}, {"role": "assistant", "content": " blue"},
    {"role": "user", "content": "cat?"}, {"role": "assistant", "content": " dog"},
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatty():
    tokenizer = hf.AutoTokenizer.from_pretrained(BASE_PATH)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("form", ["messages", "conversations", "prompt"])
def test_only_the_assistants_turns_of_a_chat_are_learned(chatty, form):
    row = {
        "messages": {"messages": CHAT},
        "conversations": {"conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in CHAT
        ]},
        "prompt": {"prompt": CHAT[:3], "completion": CHAT[3:]},
    }[form]  # fmt: skip
    encoded = TASKS["text-generation"].encode(Dataset.from_list([row]), Encoding(chatty, None, 64))[0]
    learned = chatty.decode([label for label in encoded["labels"] if label != -100])
    answers = {"prompt": " dog<|endoftext|>"}  # as TRL has it: of a prompt nothing is learned
    assert learned == answers.get(form, " blue<|endoftext|> dog<|endoftext|>")
    assert chatty.decode(encoded["input_ids"]).startswith("[user]red?[assistant] blue")


def test_a_chats_tools_are_shown_to_the_model(chatty):
    chatty.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }}({{ tool | tojson }}){% endfor %}{{ mood }}" + TEMPLATE
    )
    tools = [{"name": "add", "numbers": 2}, {"name": "ask", "whom": "Ann"}]  # a table has all keys of both
    rows = [
        {"messages": CHAT, "tools": tools, "chat_template_kwargs": {"mood": "calm"}},
        {"messages": CHAT, "tools": [], "chat_template_kwargs": None},
    ]
    encoded = TASKS["text-generation"].encode(Dataset.from_list(rows), Encoding(chatty, None, 256))
    shown = 'add({"name": "add", "numbers": 2})ask({"name": "ask", "whom": "Ann"})calm[user]red?'
    assert chatty.decode(encoded[0]["input_ids"]).startswith(shown)
    assert chatty.decode(encoded[1]["input_ids"]).startswith("[user]red?")
    as_text = Dataset.from_list([{"messages": CHAT, "tools": text} for text in (json.dumps(tools), "", None)])
    encoded = TASKS["text-generation"].encode(as_text, Encoding(chatty, None, 256))
    assert chatty.decode(encoded[0]["input_ids"]).startswith(shown.replace("calm", ""))
    assert all(chatty.decode(row["input_ids"]).startswith("[user]red?") for row in list(encoded)[1:])
    bad = Dataset.from_list([{"messages": CHAT, "tools": "calculator"}])
    with pytest.raises(ValueError, match="`tools` of a chat is no JSON"):
        TASKS["text-generation"].encode(bad, Encoding(chatty, None, 256))


@pytest.mark.parametrize("how", ["files", "clients"])
def test_chats_of_two_forms_may_stand_beside_each_other(chatty, tmp_path, how):
    """Nothing of a prompt is learned in either."""
    forms = {"a": [{"messages": CHAT}], "b": [{"prompt": CHAT[:3], "completion": CHAT[3:]}]}
    if how == "files":
        for name, rows in forms.items():
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(rows[0]) + "\n")
        rows = load_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    else:
        rows = from_mapping({name: to_known_columns(Dataset.from_list(rows)) for name, rows in forms.items()}).dataset
    encoded = TASKS["text-generation"].encode(rows, Encoding(chatty, None, 64))
    learned = [chatty.decode([label for label in row["labels"] if label != -100]) for row in encoded]
    assert learned == [" blue<|endoftext|> dog<|endoftext|>", " dog<|endoftext|>"]


def test_a_template_that_changes_earlier_turns_is_refused(chatty):
    chatty.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="changes earlier turns"):
        TASKS["text-generation"].encode(Dataset.from_list([{"messages": CHAT}]), Encoding(chatty, None, 64))


def test_a_chat_may_start_with_the_assistant(chatty):
    encoded = TASKS["text-generation"].encode(Dataset.from_list([{"messages": CHAT[1:3]}]), Encoding(chatty, None, 64))
    assert chatty.decode([label for label in encoded[0]["labels"] if label != -100]).endswith(" blue<|endoftext|>")


def test_a_text_has_no_prompt_to_answer(tasks, tmp_path):
    texts = Dataset.from_dict({"text": ["red cat"] * 8})
    with pytest.raises(ValueError, match="answers prompts"):
        DevFTTrainer(
            "embedded", config(tmp_path, stage_layers=[2, 16], predict_with_generate=True), peft_config=lora(),
            train_dataset=texts, eval_dataset=texts,
        )  # fmt: skip


def test_a_row_without_text_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="row 2 of the data has no `text`"):
        TASKS["text-generation"].encode(Dataset.from_dict({"text": ["a", None]}), Encoding(tokenizer, None, 64))


def test_a_text_is_learned_whole(tokenizer):
    row = TASKS["text-generation"].encode(Dataset.from_dict({"text": ["red cat"]}), Encoding(tokenizer, None, 64))[0]
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["labels"]) == "red cat<|endoftext|>"


def test_each_clients_own_rows_are_evaluated(tasks, tokenizer, tmp_path):
    trainer = DevFTTrainer(
        "embedded", config(tmp_path, stage_layers=[2, 16], stage_rounds=[1], num_clients=3, client_eval_size=0.2),
        peft_config=lora(), train_dataset=tasks,
    )  # fmt: skip
    held = {name: len(rows) for name, rows in trainer.eval_dataset.items()}
    assert held == {"client-0": 8, "client-1": 8, "client-2": 8}
    parts = map(trainer.train_dataset.select, trainer.clients.rows.values())
    trained = [set(map(str, rows["input_ids"])) for rows in parts]
    own = [set(map(str, rows["input_ids"])) for rows in trainer.eval_dataset.values()]
    assert not set.union(*trained) & set.union(*own)
    trainer.train()
    metrics = json.loads((tmp_path / "stage-2" / "stage_config.json").read_text())["metrics"]
    losses = [metrics[f"eval_full_client-{number}_loss"] for number in range(3)]
    assert metrics["eval_full_loss"] == pytest.approx(np.mean(losses))
    assert metrics["eval_full_worst_loss"] == max(losses)
