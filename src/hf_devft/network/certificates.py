"""Makes a certificate authority, the SuperLink's certificate, and keys of nodes.

    devft federation certificates --hosts 10.0.0.1 superlink.example.org    # where the SuperLink runs
    devft federation certificates --nodes hospital-a                        # where the node runs

The first writes `ca.crt`, which every node gets, and `server.crt` and `server.key`, which stay with the SuperLink; the
authority's own key, `ca.key`, signs further certificates. The second writes `hospital-a.key`, which stays there, and
`hospital-a.key.pub`, which the SuperLink gets to know. What is there already stays as it is.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hf_devft.cli.arguments import OneLineParser
from hf_devft.cli.errors import one_line_errors


DAYS = 825  # the most that Apple's and other verifiers accept of a server's certificate
AUTHORITY_DAYS = 3650  # so that servers' certificates can be renewed


@dataclass
class CertificateArguments:
    """What to make."""

    folder: str = field(default="certificates", metadata={"help": "Where it is written."})
    hosts: list[str] | None = field(
        default=None, metadata={"help": "Names and addresses by which nodes reach the SuperLink."}
    )
    nodes: list[str] | None = field(default=None, metadata={"help": "Names of nodes to make keys for."})


def make_server_certificate(folder: Path, hosts: Sequence[str]) -> None:
    """Write `ca.crt` and `ca.key`, unless they are there, and a `server.crt` for these hosts with its key.

    Raises:
        FileExistsError: there is a server's certificate already.
        ValueError: the authority's key is not there, or no key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_free(folder / "server.key", folder / "server.crt")
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hf-devft federation")])
    if (folder / "ca.crt").exists():
        authority = _read_authority(folder / "ca.key")
    else:
        authority = ec.generate_private_key(ec.SECP384R1())
        rules = x509.BasicConstraints(ca=True, path_length=0)
        certificate = (
            _builder(authority_name, authority_name, authority.public_key(), authority.public_key(), AUTHORITY_DAYS)
            .add_extension(rules, True)
            .add_extension(_usage(signs_certificates=True), True)
        )
        _write(folder / "ca.key", _pem(authority), secret=True)
        _write(folder / "ca.crt", certificate.sign(authority, hashes.SHA384()).public_bytes(Encoding.PEM))
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hf-devft SuperLink")]),  # its hosts are below
            authority_name,
            key.public_key(),
            authority.public_key(),
        )
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(_usage(signs_certificates=False), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    )
    _write(folder / "server.key", _pem(key), secret=True)
    _write(folder / "server.crt", certificate.sign(authority, hashes.SHA384()).public_bytes(Encoding.PEM))


def _read_authority(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the key of the authority whose certificate is there."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}, the key of the authority whose ca.crt is there, cannot be read ({error}): put it there for as "
            "long as you make certificates, or choose another --folder for a new authority."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is no key of an elliptic curve: choose another --folder for a new authority.")
    return key


def make_node_key(folder: Path, name: str) -> Path:
    """Write a node's pair of keys, in OpenSSH's form, as Flower reads them; returns the private one's path.

    Raises:
        FileExistsError: it is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.key"
    _check_free(path, folder / f"{name}.key.pub")
    key = ec.generate_private_key(ec.SECP384R1())
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), secret=True)
    _write(folder / f"{name}.key.pub", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path


def _check_free(*pair: Path) -> None:
    """Refuse to write a pair of files of which one is there.

    Raises:
        FileExistsError: says which.
    """
    if there := [str(path) for path in pair if path.exists()]:
        raise FileExistsError(f"{' and '.join(there)} is there already: delete both of the pair, or choose another.")


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
        + ("decipher_only",),
        False,
    )
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        **others,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    authority: ec.EllipticCurvePublicKey,
    days: int = DAYS,
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), False)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, secret: bool = False) -> None:
    """Write a new file; one that is secret can be read by its owner alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def main(argv: Sequence[str] | None = None) -> None:
    """Make what the flags say.

    Args:
        argv: the flags; default: the process's.
    """
    with one_line_errors():
        (arguments,) = OneLineParser(CertificateArguments).parse_args_into_dataclasses(argv)
        folder = Path(arguments.folder)
        if not (arguments.hosts or arguments.nodes):
            raise ValueError("give --hosts, for the SuperLink's certificate, or --nodes, for keys of nodes.")
        if arguments.hosts:
            make_server_certificate(folder, arguments.hosts)
        for name in arguments.nodes or ():
            make_node_key(folder, name)
    print(f"written to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
