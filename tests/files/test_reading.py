"""What is read is checked first."""

import json
import os
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from hf_devft.files import CHECKSUMS, naming, read_json, read_record, read_tensors, write_json, write_tensors


@dataclass
class Record:
    count: int
    names: list[str]


def test_what_is_written_is_read_again(tmp_path):
    write_json(tmp_path / "a.json", {"count": 3, "names": ["x"], "newer": 1})
    assert read_record(tmp_path / "a.json", Record) == Record(3, ["x"])
    tensors = {"x": torch.ones(2, 2).t(), "y": torch.ones(4)[:2]}
    write_tensors(tmp_path / "a.safetensors", tensors)
    found = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / CHECKSUMS).read_text()).keys() == {"a.json", "a.safetensors"}


def test_others_may_read_weights_where_they_may_read_the_rest(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("a.safetensors", "a.json")} == {"0o644"}


def test_damage_is_told_and_a_change_of_ones_own_is_allowed(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"count": 3, "names": []})
    path.write_text('{"count": 4, "names": []}')
    with pytest.raises(
        ValueError, match=r"a\.json is damaged or was changed: .* delete checksums\.json, if the change"
    ):
        read_json(path)
    (tmp_path / CHECKSUMS).unlink()
    assert read_record(path, Record).count == 4
    (tmp_path / CHECKSUMS).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"checksums\.json is no list of checksums"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"count": "3", "names": []}', r"a\.json is not as a run writes it: count: Input should be a valid integer"),
        ('{"count": 3, "names": [1]}', r"names\.0"),
        ('{"count": 3}', "names: Field required"),
        ("[]", "all of it"),
        ("[" * 200_000, "no readable JSON"),
        ("{", "no readable JSON"),
    ],
)
def test_json_of_another_form(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_record(tmp_path / "a.json", Record)


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "huge"])
@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_only_regular_files_are_opened(tmp_path, read, kind):
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(ValueError, match=str(path)):
        read(path)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([float("-inf")]), "not finite"),
        (torch.tensor([3e38]), "above 1e\\+06"),
        (torch.ones(2, dtype=torch.int32), "of type I32"),
        (torch.ones(2, dtype=torch.bool), "of type BOOL"),
        (torch.ones(2, dtype=torch.float8_e4m3fn), "of type F8_E4M3"),
    ],
)
def test_tensors_that_nothing_can_be_made_of(tmp_path, tensor, says):
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors cannot be used: 'x' .*{says}"):
        read_tensors(tmp_path / "a.safetensors")


def test_an_error_says_once_where_it_comes_from():
    with pytest.raises(ValueError, match=r"^here: it is broken$"), naming("here"):
        raise ValueError("it is broken")
    with pytest.raises(ValueError, match=r"^here/a is broken$"), naming("here"):
        raise ValueError("here/a is broken")
