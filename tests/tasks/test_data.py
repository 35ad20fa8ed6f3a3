import copy
import json

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from hf_devft.tasks.data import load_files, to_known_columns, tokenize


@pytest.mark.parametrize(("row", "prompt", "completion"), [
    ({"prompt": "a", "completion": "b"}, "a", "b"),
    ({"instruction": "a", "input": "", "output": "b"}, "### Instruction:\na\n\n### Response:\n", "b"),
    ({"instruction": "a", "input": "c", "response": "b"},
     "### Instruction:\na\n\n### Input:\nc\n\n### Response:\n", "b"),
    ({"instruction": "a", "response": "b"}, "### Instruction:\na\n\n### Response:\n", "b"),
    ({"instruction": "a", "context": "c", "response": "b"},
     "### Instruction:\na\n\n### Input:\nc\n\n### Response:\n", "b"),
    ({"question": "a", "answer": "b"}, "Question: a\nAnswer:", " b"),
    ({"question": "a", "context": "c", "answer": "b"}, "c\n\nQuestion: a\nAnswer:", " b"),
])  # fmt: skip
def test_known_formats(row, prompt, completion):
    converted = to_known_columns(Dataset.from_list([row]))[0]
    assert (converted["prompt"], converted["completion"]) == (prompt, completion)


def test_passages_that_are_no_text_are_left_out():
    row = {"question": "a", "answer": "b", "context": {"title": ["x"], "sentences": [["y"]]}}
    assert to_known_columns(Dataset.from_list([row]))[0]["prompt"] == "Question: a\nAnswer:"


def test_a_text_beside_a_prompt_without_an_answer_is_what_is_learned(tokenizer):
    row = tokenize(Dataset.from_list([{"prompt": "Write.", "text": "red"}]), tokenizer, 64)[0]
    assert tokenizer.decode(row["labels"]) == "red<|endoftext|>"


def test_unknown_columns_name_the_known_ones():
    with pytest.raises(ValueError, match="question/answer") as error:
        to_known_columns(Dataset.from_dict({"body": ["a"]}))
    assert "semicolons" not in str(error.value)
    with pytest.raises(ValueError, match="separated by semicolons"):
        to_known_columns(Dataset.from_dict({"prompt;completion": ["a;b"]}))


@pytest.mark.parametrize(("text", "completion"), [
    ("prompt,completion\n1+1=,2\n2+2=,4\n", "4"),
    ("question,answer\n1+1,2\n2+2,4.5\n", " 4.5"),
    ("instruction,output\nsum,2\nsum,4\n", "4"),
    ("instruction,output\nis it?,True\nis it?,False\n", "False"),
    ("question,answer\ncode?,001\ncode?,007\n", " 007"),
    ("question,answer\nmissing?,NA\nmissing?,None\n", " None"),
    ("prompt,completion\nhow much?,1.25\nhow much?,1.50\n", "1.50"),
])  # fmt: skip
def test_numbers_are_text(tmp_path, tokenizer, text, completion):
    rows = load_files([write(tmp_path / "sums.csv", text)])
    assert rows[1]["completion"] == completion
    labels = [label for label in tokenize(rows, tokenizer, 64)[1]["labels"] if label != -100]
    assert tokenizer.decode(labels) == f"{completion}<|endoftext|>"


def test_an_empty_cell_is_none(tmp_path):
    with pytest.raises(ValueError, match="row 2 of the data has no `answer`"):
        load_files([write(tmp_path / "sums.csv", "question,answer\nq,1\nq,\n")])


def test_dates_are_not_learned_in_another_form(tmp_path):
    rows = '{"question": "when?", "answer": "1969-07-20"}\n'
    with pytest.raises(ValueError, match="answer of the data is read as dates"):
        load_files([write(tmp_path / "dates.jsonl", rows)])


def test_chats_have_one_form(tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert to_known_columns(Dataset.from_list([{"conversations": turns}]))[0]["messages"] == turns
    empty = [{"from": "system", "value": ""}, {"from": "gpt", "value": "b"}]
    assert to_known_columns(Dataset.from_list([{"conversations": empty}]))[0]["messages"][0]["content"] == ""
    for chat in ([{"from": "human", "value": "a"}], [turns[0], {"role": "assistant", "content": None}]):
        with pytest.raises(ValueError, match=r"chat template does not take a chat .*: give each turn `role` and"):
            tokenize(Dataset.from_list([{"messages": chat}]), tokenizer, 8)


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_a_column_that_the_trainer_would_take_for_labels_goes(tokenizer, name):
    rows = Dataset.from_dict({"text": ["red", "cat"], name: ["good", "bad"], "of": ["a", "b"]})
    assert set(tokenize(rows, tokenizer, 8).column_names) == {"text", "of", "input_ids", "labels"}


def test_a_file_that_is_not_utf_8_is_to_be_saved_so(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\nö,ä\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv could not be read as CSV: .*save it as UTF-8"):
        load_files([path])


def test_a_chat_without_an_answer_tells_its_roles(tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"
    chat = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}])
    with pytest.raises(ValueError, match=r'no turn of the role "assistant".*roles: user, bot'):
        tokenize(chat, tokenizer, 8)


def test_labels_are_on_the_completion_only(tokenizer):
    row = tokenize(Dataset.from_list([{"prompt": "Hello there:", "completion": " blue"}]), tokenizer, 32)[0]
    labelled = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labelled) == " blue<|endoftext|>"
    assert row["input_ids"][: -len(labelled)] == tokenizer("Hello there:").input_ids
    assert row["labels"][: -len(labelled)] == [-100] * (len(row["labels"]) - len(labelled))


def test_tokenizers_that_end_every_text_end_a_row_once(tokenizer):
    ending = copy.deepcopy(tokenizer)
    end = (ending.eos_token, ending.eos_token_id)
    ending._tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert ending("a b").input_ids[-1] == ending.eos_token_id
    for row in ({"prompt": "Hello there:", "completion": " blue"}, {"text": "Hello there"}):
        rows = Dataset.from_list([row])
        assert tokenize(rows, ending, 32)[0] == tokenize(rows, tokenizer, 32)[0]


@pytest.mark.parametrize("max_length", [2, 5, 10])
def test_long_rows_keep_something_to_learn(tokenizer, max_length):
    rows = Dataset.from_list(
        [{"prompt": "a b c d e f g h", "completion": " " + "x y " * 9}, {"prompt": "a " * 50, "completion": "b"}]
    )
    for row in tokenize(rows, tokenizer, max_length):
        assert len(row["input_ids"]) == len(row["labels"]) <= max_length
        assert any(label != -100 for label in row["labels"])


def test_files_of_several_formats(tmp_path):
    (tmp_path / "maths.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    (tmp_path / "code.json").write_text(json.dumps([{"instruction": "add", "input": "", "response": "+"}]))
    rows = load_files([tmp_path / "maths.jsonl", tmp_path / "code.json"])
    assert rows["source"][:] == ["maths", "code"]
    assert set(rows.column_names) == {"prompt", "completion", "source"}


PAIR = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(("names", "sources"), [
    (["x/train.jsonl", "y/train.jsonl"], ["x/train.jsonl", "y/train.jsonl"]),
    (["a.jsonl", "a.csv", "b.jsonl"], ["a.jsonl", "a.csv", "b.jsonl"]),
    (["x/a.jsonl", "y/b.jsonl"], ["a", "b"]),
])  # fmt: skip
def test_no_two_files_are_one_source(tmp_path, names, sources):
    files = [write(tmp_path / name, PAIR if name.endswith("l") else "prompt,completion\na,b\n") for name in names]
    assert load_files(files)["source"][:] == sources


def test_a_column_source_of_ones_own_gives_way_to_the_files(tmp_path, caplog):
    text = json.dumps({"text": "a", "source": "web"}) + "\n" + json.dumps({"text": "b", "source": "book"}) + "\n"
    files = [write(tmp_path / name, text) for name in ("a.jsonl", "b.jsonl")]
    assert load_files(files[:1])["source"][:] == ["web", "book"]
    assert not caplog.text
    assert load_files(files)["source"][:] == ["a", "a", "b", "b"]
    assert "a.jsonl has a column 'source'" in caplog.text


@pytest.mark.parametrize(("texts", "said"), [
    ([PAIR, PAIR + '{"prompt": "a", "completion": null}\n'], "1.jsonl: row 2 of the data has no `completion`"),
    ([PAIR, PAIR + PAIR + '{"prompt": "a"}\n'], "1.jsonl: row 3 of the data has no `completion`"),
    ([PAIR, '{"text": "a"}\n'], "0.jsonl has the columns .*'prompt', 'completion'.*, .*1.jsonl has .*'text'"),
    ([PAIR, '{"question": "a", "answer": null}\n'], "1.jsonl: row 1 of the data has no `answer`"),
    (['{"question": "a", "answer": "b"}\n', '{"text": "a"}\n'],
     r"0.jsonl has the columns \['question', 'answer'\], .*1.jsonl has \['text'\]"),
    ([PAIR, ""], "1.jsonl is empty"),
])  # fmt: skip
def test_what_is_wrong_with_files_says_where(tmp_path, texts, said):
    files = [write(tmp_path / f"{number}.jsonl", text) for number, text in enumerate(texts)]
    with pytest.raises(ValueError, match=said):
        load_files(files)


@pytest.mark.parametrize("row", [
    {"prompt": "a", "completion": "b", "text": None},
    {"messages": [{"role": "user", "content": "a"}], "prompt": None, "text": None},
])  # fmt: skip
def test_texts_that_are_not_read_may_be_missing(tmp_path, row):
    path = write(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row | {"text": "c"}) + "\n")
    assert len(load_files([path])) == 2


def test_a_file_is_not_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(ValueError, match=r"a\.jsonl is given twice"):
        load_files(["a.jsonl", str(tmp_path / "a.jsonl")])
    with pytest.raises(FileNotFoundError, match="Separate them by spaces"):
        load_files(["a.jsonl,b.jsonl"])


def test_a_broken_line_is_named_once(tmp_path, caplog, capsys):
    rows = [json.dumps({"prompt": "a", "completion": "b"})] * 3
    for number, broken in ((3, '{"prompt": "a", broken'), (1, "[1, 2]")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join([*rows[: number - 1], broken, *rows]))
        with pytest.raises(ValueError, match=rf"{number}.jsonl could not be read as JSON: line {number} is no JSON"):
            load_files([path])
    assert "JSON parse error" not in caplog.text + "".join(capsys.readouterr())


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv is empty"):
        load_files([tmp_path / "a.csv"])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_files([tmp_path / "nowhere.json"])
    (tmp_path / "broken.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_files([tmp_path / "broken.json"])
