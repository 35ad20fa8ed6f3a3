"""Names that are bound to keys."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.network.certificates import make_node_key
from hf_devft.network.names import is_signed, read_public_keys, sign_name


KEY, OTHER = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))


@given(name=st.text(max_size=20), other=st.text(max_size=20), challenge=st.binary(), later=st.binary())
def test_only_the_keys_owner_signs_a_name_and_only_for_this_challenge(name, other, challenge, later):
    signature = sign_name(KEY, name, challenge)
    assert is_signed(KEY.public_key(), name, challenge, signature)
    assert not is_signed(OTHER.public_key(), name, challenge, signature)
    assert is_signed(KEY.public_key(), other, challenge, signature) == (other == name)
    assert is_signed(KEY.public_key(), name, later, signature) == (later == challenge)
    assert not is_signed(KEY.public_key(), name, challenge, b"")


def test_keys_are_read_as_the_command_writes_them(tmp_path):
    path = make_node_key(tmp_path, "org-a")
    private = load_ssh_private_key(path.read_bytes(), None)
    keys = read_public_keys(tmp_path, ["org-a"])
    assert is_signed(keys["org-a"], "org-a", b"1", sign_name(private, "org-a", b"1"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lacks org-a.key.pub, org-b.key.pub: put the participants' public keys there"),
        ({"org-a.key.pub": "?"}, "lacks org-b.key.pub: put"),
        ({"org-a.key.pub": "?", "org-b.key.pub": "?"}, "org-a.key.pub is no public key in OpenSSH's form"),
        ({"org-a.key.pub": "-----BEGIN PUBLIC KEY-----\n", "org-b.key.pub": "?"}, "org-a.key.pub is no public key"),
    ],
)
def test_keys_that_are_missing_or_broken_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_public_keys(tmp_path, ["org-a", "org-b"])


def test_a_key_of_another_kind_is_refused(tmp_path):
    (tmp_path / "org-a.key.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDL2CaCeV3OtDj+sqgv8VoHiJJQqIzNUT2cZ1pbXlUvR"
    )
    with pytest.raises(ValueError, match="no key of an elliptic curve"):
        read_public_keys(tmp_path)
    with pytest.raises(ValueError, match=r"lacks NAME\.key\.pub"):
        read_public_keys(tmp_path / "none")
