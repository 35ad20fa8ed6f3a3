"""The output folder: one run at a time, and not another one's."""

import multiprocessing

import pytest
from conftest import config

from hf_devft.run.claim import claim


def hold(folder, started, end):
    with claim(config(folder), is_new=True):
        started.set()
        end.wait()


def test_a_folder_is_one_run_s_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, started, end))
    other.start()
    started.wait(60)
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


def test_a_run_is_not_started_beside_another_one(make_trainer, tmp_path):
    trainer = make_trainer(overwrite_output_dir=False)
    trainer.train()
    trainer.train()  # its own, again
    with pytest.raises(ValueError, match=r"holds a run already .*choose another `output_dir`"):
        make_trainer(overwrite_output_dir=False).train()
    assert (tmp_path / "run" / "stage-2").exists()
