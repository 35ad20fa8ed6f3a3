import pytest

from hf_devft.federation.privacy import read_secret


def test_it_is_drawn_once_and_for_its_owner_alone(tmp_path):
    secret = read_secret(tmp_path / "run")
    path = tmp_path / "run" / "privacy_secret"
    assert read_secret(tmp_path / "run") == secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["privacy_secret"]
    assert read_secret(tmp_path / "other") != secret


def test_a_run_goes_on_with_its_own_rows(tmp_path):
    secret = read_secret(tmp_path, "some rows")
    assert read_secret(tmp_path, "some rows", is_new=False) == secret
    with pytest.raises(ValueError, match="had other rows, or dealt out otherwise"):
        read_secret(tmp_path, "others", is_new=False)
    assert read_secret(tmp_path, "others") == secret, "a new run"
    assert read_secret(tmp_path, "others", is_new=False) == secret
    assert (tmp_path / "privacy_secret").stat().st_mode & 0o777 == 0o600


def test_a_run_without_its_secret_does_not_go_on(tmp_path):
    with pytest.raises(ValueError, match="privacy_secret is missing"):
        read_secret(tmp_path, is_new=False)


def test_what_is_none_says_what_to_do(tmp_path):
    (tmp_path / "privacy_secret").write_text("here was a number\n")
    with pytest.raises(ValueError, match="privacy_secret holds no number: restore it, or delete it"):
        read_secret(tmp_path)
