import gc
import json
import os
from pathlib import Path

import huggingface_hub.utils._http
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from server import TOKEN, Fault, serve
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from hf_devft.hub.publisher import RunPublisher
from hf_devft.hub.push import HubPusher, Push, finished_stages, left_over, push_run, push_stages, stage_push
from hf_devft.run.benchmarks import Score, push_scores


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's retries
    huggingface_hub.utils._http.close_session()
    with serve(tmp_path / "hub") as server:
        yield server
    huggingface_hub.utils._http.close_session()


@pytest.fixture
def output(tmp_path):
    """A run of two stages."""
    for stage in (1, 2):
        folder = tmp_path / "run" / f"stage-{stage}"
        (folder / "submodel").mkdir(parents=True)
        (folder / "stage_config.json").write_text(f'{{"stage": {stage}}}')
        (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
        (folder / "adapter_model.safetensors").write_bytes(b"full" * stage)
        (folder / "submodel" / "adapter_model.safetensors").write_bytes(b"sub" * stage)
    return tmp_path / "run"


def pusher(hub, token=TOKEN, **kwargs) -> HubPusher:
    return HubPusher("me/run", HfApi(endpoint=hub.url, token=token), **kwargs)


def test_a_stage_is_one_commit_and_a_tag(hub, output):
    pushing = pusher(hub, private=True)
    for stage in finished_stages(output):
        pushing.submit(stage_push(output, stage))
    assert pushing.finish() == []
    repo = hub.repos["me/run"]
    assert repo.private
    assert list(repo.messages.values()) == ["initial commit", "Stage 1", "Stage 2"]
    assert set(repo.tags) == {"stage-1", "stage-2"}
    at = {tag: repo.commits[oid] for tag, oid in repo.tags.items()}
    names = {"README.md", "adapter_model.safetensors", "stage_config.json"}
    first = names | {f"stage-1/{name}" for name in names} | {"stage-1/submodel/adapter_model.safetensors"}
    assert set(at["stage-1"]) == first | {".gitattributes"}
    assert at["stage-2"]["adapter_model.safetensors"] == at["stage-2"]["stage-2/adapter_model.safetensors"]
    assert at["stage-2"]["adapter_model.safetensors"] != at["stage-1"]["adapter_model.safetensors"]
    assert set(first) < set(at["stage-2"])


def test_secrets_and_what_simulated_clients_keep_stay_here(output):
    folder = output / "stage-1"
    (folder / "clients" / "client-0").mkdir(parents=True)
    for name in ("privacy_secret", "federation.safetensors", "clients/client-0/round-1.safetensors"):
        (folder / name).write_text("1")
    pushed = [each.path_in_repo for each in Push("Adapter", {"": folder, "stage-1": folder}).operations()]
    names = {"README.md", "adapter_model.safetensors", "stage_config.json"}
    assert {*pushed} == names | {f"stage-1/{name}" for name in (*names, "submodel/adapter_model.safetensors")}


@pytest.mark.parametrize("pushed", [[], [1], [2], [1, 2]], ids=str)
def test_the_last_stage_is_at_the_root_whatever_was_there(hub, output, pushed):
    for stage in pushed:
        pusher(hub).push(stage_push(output, stage))
    for missing in ([1, 2][len(pushed) if pushed != [2] else 0 :], []):
        anew = HubPusher("run", HfApi(endpoint=hub.url, token=TOKEN))  # whose owner is not known yet
        assert len(push_stages(anew, output)) == len(missing)
        repo = hub.repos["me/run"]
        newest = repo.commits[repo.branches["main"]]
        assert newest["adapter_model.safetensors"] == newest["stage-2/adapter_model.safetensors"]
        assert set(repo.tags) == {"stage-1", "stage-2"}


def test_a_branch_of_its_own(hub, output):
    pushing = pusher(hub, revision="try")
    pushing.push(stage_push(output, 1))
    repo = hub.repos["me/run"]
    assert "stage-1/README.md" in repo.commits[repo.branches["try"]]
    assert "stage-1/README.md" not in repo.commits[repo.branches["main"]]


def test_pushing_again_moves_the_tag(hub, output):
    pushing = pusher(hub)
    pushing.push(stage_push(output, 1))
    before = hub.repos["me/run"].tags["stage-1"]
    (output / "stage-1" / "adapter_model.safetensors").write_bytes(b"other")
    pushing.push(stage_push(output, 1))
    assert hub.repos["me/run"].tags["stage-1"] != before


@pytest.mark.parametrize("fault", [
    Fault("/commit/", 500, times=1),
    Fault("/api/repos/create", 403, times=1),
    Fault("/lfs/", 0, times=6),  # the client itself tries five times
    Fault("/tag/", 500, times=1),
], ids=["commit-fails", "no-permission", "connection-cut", "tag-fails"])  # fmt: skip
def test_what_fails_is_pushed_with_the_next_stage(hub, output, fault, caplog):
    hub.faults.append(fault)
    pushing = pusher(hub)
    pushing.submit(stage_push(output, 1))
    pushing._running.result()
    assert [push.title for push in pushing.pending] == ["Stage 1"]
    assert "Stage 1 is not on the Hub yet" in caplog.text
    pushing.submit(stage_push(output, 2))
    assert pushing.finish() == []
    assert set(hub.repos["me/run"].tags) == {"stage-1", "stage-2"}
    assert pushing.error is None


@pytest.mark.parametrize(("token", "faults"), [("hf_wrong", []), (TOKEN, [Fault("/", 503)])], ids=["no-token", "down"])
def test_what_never_gets_there_is_told_with_the_command_that_pushes_it(hub, output, token, faults):
    hub.faults += faults
    pushing = pusher(hub, token)
    for stage in (1, 2):
        pushing.submit(stage_push(output, stage))
    assert [push.title for push in pushing.finish()] == ["Stage 1", "Stage 2"]
    pushing.private, pushing.revision = True, "try"
    message = left_over(pushing, output)
    assert "Not on the Hub: Stage 1, Stage 2" in message
    assert f"devft push {output} me/run --private --revision try" in message


def test_a_hub_that_cannot_be_reached_is_one_line(hub, output, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"cannot be reached .*: nothing is lost, push again later"):
        push_run(str(output), "me/run", None, None)


def test_a_branch_that_is_not_there_does_not_hold_what_another_has(hub, output, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_run(str(output), "me/run", None, None)
    push_run(str(output), "me/run", None, None)
    assert capsys.readouterr().out.endswith("Everything is on the Hub already.\n")
    push_run(str(output), "me/run", "v2", None)
    assert "already" not in capsys.readouterr().out
    assert {"main", "v2"} <= hub.repos["me/run"].branches.keys()


def test_a_card_that_has_changed_since_is_pushed_again(hub, output, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_run(str(output), "me/run", None, None)
    card = output / "stage-2" / "README.md"
    card.write_text("scores")
    push_run(str(output), "me/run", None, None)
    assert "already" not in capsys.readouterr().out
    repo = hub.repos["me/run"]
    for name in ("README.md", "stage-2/README.md"):
        blob = repo.commits[repo.tags["stage-2"]][name]
        assert (hub.blobs / blob).read_text() == "scores"
    assert list(repo.messages.values()).count("Stage 1") == 1, "which has not changed"


def test_a_card_that_was_edited_on_the_hub_stays(hub, output, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_run(str(output), "me/run", None, None)
    HfApi(hub.url, TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="me/run")
    push_run(str(output), "me/run", None, None)
    assert capsys.readouterr().out.endswith("Everything is on the Hub already.\n")


def test_by_hand(hub, make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    trainer = make_trainer(hub_model_id="me/hand", hub_token=TOKEN)
    trainer.push_to_hub()  # the adapter as it is
    repo = hub.repos["me/hand"]
    assert list(repo.messages.values())[1:] == ["Adapter"]
    trainer.train()
    assert len(repo.messages) == 2, "only by hand"
    commit = trainer.push_to_hub()
    assert repo.tags["stage-2"] == commit.oid == repo.branches["main"]
    assert "stage-1/stage_config.json" in repo.commits[commit.oid]


def test_the_end_strategy_pushes_every_stage_at_the_end(hub, make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            assert not hub.repos

    make_trainer(
        push_to_hub=True, hub_model_id="end", hub_strategy="end", hub_token=TOKEN, callbacks=[Watch()]
    ).train()
    assert set(hub.repos["me/end"].tags) == {"stage-1", "stage-2"}


def test_the_owner_is_asked_for_by_several_threads_at_once(hub, monkeypatch):
    asked = HubPusher("run", HfApi(endpoint=hub.url, token=TOKEN))
    whoami, calls = asked.api.whoami, []

    def answer_late():
        if not calls:  # another thread asks, and is answered before
            calls.append(1)
            asked.full_name()
        return whoami()

    monkeypatch.setattr(asked.api, "whoami", answer_late)
    assert asked.full_name() == asked.full_name() == "me/run"


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_are_pushed_as_the_strategy_says(hub, make_trainer, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("no links on this disk")))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    make_trainer(
        push_to_hub=True, hub_model_id="all", hub_strategy="all_checkpoints", hub_token=TOKEN, hub_always_push=True,
        save_strategy="steps", save_steps=1,
    ).train()  # fmt: skip
    repo = hub.repos["me/all"]
    newest = repo.commits[repo.branches["main"]]
    assert {f"checkpoint-{step}/devft_state.json" for step in (1, 2, 3, 4)} <= set(newest)


def test_pushing_by_hand_tells_what_goes_wrong(hub, make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    trainer = make_trainer(hub_model_id="somebody/run", hub_token=TOKEN)
    with pytest.raises(HfHubHTTPError, match="403"):
        trainer.push_to_hub()


def test_by_hand_pushes_only_what_is_not_there(hub, make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    trainer = make_trainer(push_to_hub=True, hub_model_id="run", hub_token=TOKEN)
    trainer.train()
    repo = hub.repos["me/run"]
    before = list(repo.messages.values())
    assert trainer.push_to_hub() is None
    assert list(repo.messages.values()) == before, "the root would go back to stage 1"
    trainer.push_to_hub(revision="side", private=True)
    assert trainer.publisher.pusher.revision is None, "an exception for one push only"
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert 'from_pretrained("me/run", revision="stage-2")' in card
    assert "load_submodel" not in card, "the base has no name to load it by"


def test_a_checkpoint_that_is_rotated_away_is_still_pushed(hub, make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.faults.append(Fault("/commit/", 500, times=2))
    trainer = make_trainer(
        push_to_hub=True, hub_model_id="all", hub_strategy="all_checkpoints", hub_token=TOKEN, hub_always_push=True,
        save_strategy="steps", save_steps=1, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    repo = hub.repos["me/all"]
    newest = repo.commits[repo.branches["main"]]
    assert {f"checkpoint-{step}/devft_state.json" for step in (1, 2, 3, 4)} <= set(newest)
    gc.collect()
    assert not list(Path(trainer.args.output_dir).glob(".push-*"))


def test_stages_of_an_earlier_run_are_not_this_runs(output):
    (output / "stage-1-old").mkdir()
    (output / "stage-1-old" / "stage_config.json").write_text("{}")
    assert finished_stages(output) == [1, 2]
    one = {"stage": 1, "num_stages": 2, "num_layers": 2, "full_layers": 4, "rounds": 1, "learning_rate": 0.1}
    (output / "stage_config.json").write_text(json.dumps(one))
    assert finished_stages(output) == [1]


def test_scores_are_put_into_the_repositorys_card(hub):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("me/scored")
    card = b"---\nlicense: mit\n---\n# A run\n"
    for name in ("README.md", "stage-1/README.md", "stage-2/README.md"):
        api.upload_file(path_or_fileobj=card, path_in_repo=name, repo_id="me/scored")
    for value in (0.25, 0.5):
        scores = [Score("bbh", "exact_match", value, 0.1, "1")]
        push_scores(api, "me/scored", 2, scores, "stage 2, full depth", "text-generation")
    push_scores(api, "me/scored", 1, [Score("bbh", "exact_match", 0.1, 0.1, "1")], "stage 1", "text-generation")
    for name, value in (("README.md", 0.5), ("stage-2/README.md", 0.5), ("stage-1/README.md", 0.1)):
        card = ModelCard.load(api.hf_hub_download("me/scored", name, force_download=True))
        assert [(each.dataset_type, each.metric_value) for each in card.data.eval_results] == [("bbh", value)]
        assert card.data.license == "mit"


@pytest.mark.parametrize("there", [[], [1], [1, 2]], ids=str)
def test_what_a_stopped_run_had_not_pushed_is_pushed_by_the_one_that_goes_on(hub, output, there):
    for stage in there:
        pusher(hub).push(stage_push(output, stage))
    before = list(hub.repos["me/run"].messages.values()) if there else ["initial commit"]
    goes_on = RunPublisher(pusher(hub), output, HubStrategy.EVERY_SAVE, always=False)
    goes_on.catch_up(3)
    goes_on.submit_stage(2)  # a later stage's push does not overtake them
    assert goes_on.pusher.finish() == []
    missing = [f"Stage {stage}" for stage in (1, 2) if stage not in there]
    assert list(hub.repos["me/run"].messages.values()) == [*before, *missing, "Stage 2"]


def test_a_checkpoint_that_cannot_be_copied_ends_no_run(hub, output, caplog):
    publisher = RunPublisher(pusher(hub), output, HubStrategy.CHECKPOINT, always=False)
    publisher.submit_checkpoint(output / "checkpoint-9", 9)
    assert "checkpoint-9 is not pushed, as it cannot be copied" in caplog.text
    assert publisher.pusher.pending == []
