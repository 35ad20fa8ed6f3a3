"""What a federation's server refuses before it waits for a client."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from loopback import Loopback

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import load_server_data
from hf_devft.network import client_app
from hf_devft.network.attendance import some_of
from hf_devft.network.messages import why_refused
from hf_devft.network.server_app import check_before_waiting, check_run


def run(folder, *flags):
    return parse_arguments(["--config", "quickstart", "--output_dir", str(folder), *flags])


def test_a_folder_of_another_run_is_refused(tmp_path):
    check_run(*run(tmp_path))
    (tmp_path / "stage-1").mkdir()
    with pytest.raises(ValueError, match=r"holds a run already .*stage-1"):
        check_run(*run(tmp_path))
    with pytest.raises(ValueError, match="cannot go with resume_from_hub"):
        check_run(*run(tmp_path, "--resume_from_hub", "me/run"))
    for flags in (["--resume_from_checkpoint", "last"], ["--overwrite_output_dir", "true"]):
        check_run(*run(tmp_path, *flags))


def test_clients_must_be_countable_and_have_their_rows_themselves(tmp_path):
    with pytest.raises(ValueError, match="how many clients"):
        check_before_waiting(*run(tmp_path), names=[], count=None)
    with pytest.raises(ValueError, match="each name once"):
        check_before_waiting(*run(tmp_path), names=["a", "a"], count=2)
    with pytest.raises(ValueError, match="leave `train_file` and `dataset_name` out"):
        load_server_data(*run(tmp_path, "--train_file", "rows.jsonl"))


def test_what_clients_would_not_have_of_the_base_is_refused(tmp_path):
    flags = ["--model_init_kwargs", '{"dtype": "float32", "revision": "main"}']
    check_before_waiting(*run(tmp_path, *flags), names=["a"], count=1)
    flags = ["--model_init_kwargs", '{"quantization_config": {"load_in_4bit": true}}']
    with pytest.raises(ValueError, match="has quantization_config, which a server does not tell its clients"):
        check_before_waiting(*run(tmp_path, *flags), names=["a"], count=1)


def test_many_names_are_cut_short():
    assert some_of([]) == "none"
    assert some_of(["a", "b"]) == "a, b"
    assert some_of(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_a_node_whose_rows_cannot_be_read_says_no_more_than_that(tmp_path, caplog):
    Loopback({})  # which says whose messages these are
    node = {"name": "org-a", "train-file": str(tmp_path / "secret-name.jsonl")}
    context = Context(1, 1, node, RecordDict(), {})
    question = Message(RecordDict({"join": ConfigRecord({"settings": "", "challenge": b""})}), 1, "query.join")
    question.metadata.__dict__["_message_id"] = "1"
    reply = client_app.answer(question, context)
    assert why_refused(reply.content) in (
        "FileNotFoundError; its own log says more",
        "ValueError; its own log says more",
    )
    assert "secret-name" in caplog.text, "which stays there"
