"""What the embedded base is called."""

import pytest

from hf_devft.embedded import BASE_PATH, portable_name, resolve_model_name


def test_its_name_is_the_same_on_any_machine():
    assert resolve_model_name("embedded") == str(BASE_PATH)
    assert portable_name(str(BASE_PATH)) == "embedded"
    assert portable_name("me/llama") == "me/llama"


@pytest.mark.parametrize("name", ["embeded", "Embedded", "embedded/"])
def test_a_mistyped_name_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="did you mean 'embedded'"):
        resolve_model_name(name)


@pytest.mark.parametrize("name", ["gpt2", "me/embedded-llama", "./embedder"])
def test_any_other_name_is_as_it_is(name):
    assert resolve_model_name(name) == name


def test_a_folder_of_such_a_name_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedder").mkdir()
    assert resolve_model_name("embedder") == "embedder"
