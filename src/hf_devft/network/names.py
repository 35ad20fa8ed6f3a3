"""A participant's name is bound to its key: it signs the name when it joins, and the server knows the keys."""

from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key


ENDING = ".key.pub"  # of a public key's file, after the name


def sign_name(key: ec.EllipticCurvePrivateKey, name: str, challenge: bytes) -> bytes:
    """Sign a name.

    Args:
        challenge: what the server has just drawn, so that no signature can be used again.
    """
    return key.sign(_signed(name, challenge), ec.ECDSA(hashes.SHA384()))


def is_signed(key: ec.EllipticCurvePublicKey, name: str, challenge: bytes, signature: bytes) -> bool:
    """Whether a name was signed by this key's owner."""
    try:
        key.verify(signature, _signed(name, challenge), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def read_public_keys(folder: Path, names: Sequence[str] = ()) -> dict[str, ec.EllipticCurvePublicKey]:
    """Read the participants' public keys, each a file `NAME.key.pub` as `devft federation certificates` writes it.

    Args:
        names: that must have one.

    Raises:
        ValueError: there are none, a name has none, or a file is no public key of an elliptic curve.
    """
    paths = {path.name.removesuffix(ENDING): path for path in sorted(folder.glob(f"*{ENDING}"))}
    if missing := sorted(set(names) - paths.keys()) or ([] if paths else ["NAME"]):
        files = ", ".join(f"{name}{ENDING}" for name in missing)
        raise ValueError(f"keys={folder} lacks {files}: put the participants' public keys there, or leave keys out.")
    keys = {}
    for name, path in paths.items():
        try:
            keys[name] = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(
                f"{path} is no public key in OpenSSH's form, as `devft federation certificates --nodes {name}` writes "
                f"it: {error}."
            ) from error
        if not isinstance(keys[name], ec.EllipticCurvePublicKey):
            raise ValueError(f"{path} is no key of an elliptic curve, as Flower's nodes have: ask {name} for that.")
    return keys


def _signed(name: str, challenge: bytes) -> bytes:
    return b"hf-devft: I join as " + name.encode() + b"\n" + challenge
