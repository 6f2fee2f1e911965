"""agent.yaml: paths, defaults, and every fault at once."""

import pytest

from agent.settings import load_settings
from schemas.files import InvalidFile

MINIMAL = """
node: n1
coordinator: 127.0.0.1:7400
model: ../model
data: run/n1
memory: {device: 2 MiB, host: 0 B, disk: 0 B}
context: {tokens: 64, sessions: 1}
"""


def load(tmp_path, text):
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    return load_settings(path)


def test_paths_are_relative_to_the_file(tmp_path):
    settings = load(
        tmp_path / "conf" if (tmp_path / "conf").mkdir() is None else tmp_path, MINIMAL + "store: store\nuses: u\n"
    )
    assert settings.data == str(tmp_path / "conf" / "run" / "n1")
    assert settings.store == str(tmp_path / "conf" / "store")
    assert settings.uses == str(tmp_path / "conf" / "u")
    assert settings.model.endswith("conf/../model")
    assert (settings.dtype, settings.threads, settings.ports.expert) == ("checkpoint", 1, 0)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("127.0.0.1:7400", "127.0.0.1", "coordinator: '127.0.0.1' is not HOST:PORT"),
        ("127.0.0.1:7400", "10.0.0.1:7400", "coordinator: 10.0.0.1 is not a loopback address"),
        ("device: 2 MiB", "device: 0 B", "memory: allows nothing"),
        ("device: 2 MiB", "device: -1 MiB", "memory.device"),
        ("sessions: 1", "sessions: 0", "context.sessions"),
        ("node: n1", "node: n1\nports: {expert: 5000, client: 5000}", "ports: names one port twice"),
        ("node: n1", "node: n1\naddress: 0.0.0.0", "address: 0.0.0.0 is not a loopback address"),
        ("node: n1", "node: n1\ncolour: red", "colour: unknown key"),
        ("data: run/n1\n", "", "data"),
    ],
)
def test_faults_are_named(tmp_path, was, now, said):
    with pytest.raises(InvalidFile) as caught:
        load(tmp_path, MINIMAL.replace(was, now))
    assert said in str(caught.value)
    assert str(tmp_path / "agent.yaml") in str(caught.value)


def test_all_faults_come_at_once(tmp_path):
    text = MINIMAL.replace("device: 2 MiB", "device: 0 B").replace("127.0.0.1:7400", "nowhere") + "address: 0.0.0.0\n"
    with pytest.raises(InvalidFile) as caught:
        load(tmp_path, text)
    assert [fault.key for fault in caught.value.faults] == ["address", "coordinator", "memory"]
