import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from hf_devft.network.certificates import main, make_node_key, make_server_certificate
from hf_devft.network.node import ConnectionArguments, DataArguments
from hf_devft.network.node import main as node


def test_a_certificate_is_for_its_hosts_and_signed_by_the_authority(tmp_path):
    make_server_certificate(tmp_path, ["10.0.0.1", "superlink.example.org"])
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    assert authority.not_valid_after_utc - server.not_valid_after_utc > timedelta(days=2000), "it can be renewed"
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink.example.org"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_secrets_are_their_owners_and_stay_as_they_are(tmp_path):
    make_server_certificate(tmp_path, ["localhost"])
    key = make_node_key(tmp_path, "org-a")
    for path in (key, tmp_path / "ca.key", tmp_path / "server.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError, match=r"org-a.key and .*org-a.key.pub is there already: delete both"):
        make_node_key(tmp_path, "org-a")
    with pytest.raises(FileExistsError, match=r"server.key and .*server.crt is there already: delete both"):
        make_server_certificate(tmp_path, ["localhost"])
    authority = (tmp_path / "ca.crt").read_bytes()
    (tmp_path / "server.crt").unlink()
    with pytest.raises(FileExistsError, match=r"server.key is there already: delete both"):
        make_server_certificate(tmp_path, ["localhost"])
    (tmp_path / "server.key").unlink()
    make_server_certificate(tmp_path, [f"{'a' * 60}.elb.example.org"])  # longer than a common name may be
    assert (tmp_path / "ca.crt").read_bytes() == authority, "one authority for further certificates"


def test_a_node_reads_its_key(tmp_path):
    key = make_node_key(tmp_path, "org-a")
    connection = ConnectionArguments(root_certificates="ca.crt", private_key=str(key))
    connection.check()
    assert connection.keys[1] == load_ssh_public_key((tmp_path / "org-a.key.pub").read_bytes())


def test_tls_and_a_key_are_asked_for_unless_refused():
    with pytest.raises(ValueError, match="--insecure goes without, for trials"):
        ConnectionArguments().check()
    with pytest.raises(ValueError, match="leave either out"):
        ConnectionArguments(insecure=True, private_key="org-a.key").check()
    ConnectionArguments(insecure=True).check()


@pytest.mark.parametrize(("run", "flags", "says"), [
    (main, ["--nodes", "team/a"], "error: .*team/a"),
    (main, ["--hots", "localhost"], "error: .*--hots"),
    (node, ["--name", "a", "--train_file", "x.jsonl", "--model_nme", "y"], "error: .*--model_nme"),
    (node, ["--name", "a", "--train_file", "x.jsonl"], "error: x.jsonl is not a file"),
])  # fmt: skip
def test_mistakes_are_one_line(run, flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=says):
        run(flags)


def test_a_node_may_have_a_base_of_some_revision(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    participant = DataArguments(name="a", train_file=[str(path)], revision="v2").participant()
    assert participant.options["model_init_kwargs"] == {"revision": "v2"}


def test_a_node_has_rows():
    with pytest.raises(ValueError, match="--train_file or --dataset_name, one of them"):
        DataArguments(name="org-a").participant()


def test_an_authority_whose_key_is_elsewhere_is_told(tmp_path, capsys):
    make_server_certificate(tmp_path, ["localhost"])
    for name in ("ca.key", "server.crt", "server.key"):
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path), "--hosts", "localhost"])
    assert "ca.key, the key of the authority whose ca.crt is there, cannot be read" in str(ended.value)
    assert not (tmp_path / "server.key").exists()
