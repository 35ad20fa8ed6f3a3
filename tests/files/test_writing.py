import os

import pytest

from hf_devft.files import atomic_file, atomic_folder, delete_folders, link_whole


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "stage-1"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "stage-1"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")

    def interrupted():
        with atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["stage-1"]


def test_leftovers_of_a_killed_write_are_cleared(tmp_path):
    (tmp_path / ".stage-1.tmp").mkdir()
    (tmp_path / ".stage-1.tmp" / "half").write_text("x")
    with atomic_folder(tmp_path / "stage-1") as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in (tmp_path / "stage-1").iterdir()] == ["a"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "card"
    with atomic_file(target) as path:
        path.write_text("old")

    def interrupted():
        with atomic_file(target) as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_deleted_folder_takes_leftovers_of_killed_deletions_with_it(tmp_path):
    for name in ("checkpoint-4", ".checkpoint-2.old", "checkpoint-6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    delete_folders([tmp_path / "checkpoint-4"], leftovers=[tmp_path / ".checkpoint-2.old"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_changes_no_other(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("no links on this disk")))
    first, second, place = tmp_path / "first", tmp_path / "second", tmp_path / "folder" / "name"
    first.write_text("1")
    second.write_text("2")
    for source in (first, first, second):
        link_whole(source, place)
        assert place.read_text() == source.read_text()
    assert (first.read_text(), second.read_text()) == ("1", "2")
