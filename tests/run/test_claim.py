"""The output folder: one run at a time, and not another one's."""

import multiprocessing
import os

import pytest
from conftest import config

from hf_devft.run.claim import check_free, claim, goes_on_in


def hold(folder, started, end):
    with claim(config(folder), is_new=True):
        started.set()
        end.wait()


def test_a_folder_is_one_run_s_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, started, end))
    other.start()
    started.wait(300)  # where other work keeps it from starting
    refused = pytest.raises(ValueError, match=r"another run is at work in .*: wait until it is over, or choose")
    with refused, claim(config(tmp_path), is_new=True):
        raise AssertionError
    other.kill()
    other.join()
    with claim(config(tmp_path), is_new=True):
        pass


def test_what_another_run_has_left_is_kept_unless_it_may_go(tmp_path):
    for name in ("stage-1", "stage-2", "checkpoint-7", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "stage_config.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("mine")
    keeps, overwrites = (config(tmp_path, overwrite_output_dir=may) for may in (False, True))
    refused = pytest.raises(ValueError, match=r"holds a run already \(checkpoint-7, stage-1, stage-2\): go on with it")
    with refused, claim(keeps, is_new=True):
        raise AssertionError
    with claim(keeps, is_new=False):
        assert (tmp_path / "stage-1").exists()
    with claim(overwrites, is_new=True):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes", "mine.txt", ".run.lock"}


def test_what_looks_like_a_run_s_but_is_none_stays(tmp_path):
    (tmp_path / "stage-data").mkdir()
    (tmp_path / "stage-1").write_text("a note")
    with claim(config(tmp_path, overwrite_output_dir=True), is_new=True):
        assert {"stage-data", "stage-1"} <= {path.name for path in tmp_path.iterdir()}


def test_a_readme_that_no_run_has_written_is_not_written_over(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    refused = pytest.raises(ValueError, match=r"README.md is no card of a run, .* choose another `output_dir`")
    with refused, claim(config(tmp_path, overwrite_output_dir=True), is_new=True):
        raise AssertionError


def test_going_on_from_elsewhere_is_a_new_run_here(make_trainer, tmp_path):
    options = {"overwrite_output_dir": False, "save_strategy": "steps", "save_steps": 1}
    for name in ("a", "b"):
        make_trainer(output_dir=tmp_path / name, **options).train()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"b holds a run already"):
        make_trainer(output_dir=tmp_path / "b", **options).train(str(tmp_path / "a" / "checkpoint-1"))
    assert there == {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*.safetensors")}
    make_trainer(output_dir=tmp_path / "a", **options).train(str(tmp_path / "a" / "checkpoint-1"))


def test_a_run_is_not_started_beside_another_one(make_trainer, tmp_path):
    trainer = make_trainer(overwrite_output_dir=False)
    trainer.train()
    trainer.train()  # its own, again
    with pytest.raises(ValueError, match=r"holds a run already .*choose another `output_dir`"):
        make_trainer(overwrite_output_dir=False).train()
    assert (tmp_path / "run" / "stage-2").exists()


def test_copies_that_a_kill_left_while_they_were_pushed_go(tmp_path):
    own = f".push-{os.getpid()}-a"  # which is still to be pushed
    for name in (own, ".push-0-a"):
        (tmp_path / name).mkdir()
    with claim(config(tmp_path), is_new=False):
        assert {path.name for path in tmp_path.glob(".push-*")} == {own}


def test_a_run_goes_on_from_its_own_folder_whose_root_is_the_newest_stage(tmp_path):
    assert goes_on_in(tmp_path, tmp_path)
    assert goes_on_in(tmp_path, tmp_path / "stage-1")
    assert not goes_on_in(tmp_path, tmp_path / "other" / "stage-1")
    (tmp_path / "stage-1").mkdir()
    check_free(config(tmp_path, overwrite_output_dir=False, resume_from_checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match="holds a run already"):  # what comes from there is not what is here
        check_free(config(tmp_path, overwrite_output_dir=False, resume_from_hub="me/run"))
