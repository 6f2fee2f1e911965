import json

import pytest
import yaml

from schemas.files import InvalidFile
from schemas.topology import Topology, load_topology, reachable

GOOD = {
    "cluster": "shop-floor",
    "model": "model",
    "nodes": [
        {
            "id": "gateway",
            "address": "127.0.0.1",
            "memory": {"device": "5 MiB", "host": "3 MiB", "disk": "64 MiB"},
            "compute": {"expert_us": 40, "host_expert_us": 90},
            "ingress": {"workload": "code", "tokens_per_s": 20},
        },
        {"id": "press", "memory": {"device": "9 MiB"}},
    ],
    "links": [{"between": ["gateway", "press"], "latency": "2 ms", "bandwidth": "500 Mbit/s"}],
    "workloads": {"code": "traces/code.safetensors"},
    "context": {"tokens": 1024, "sessions": 2},
    "pins": [{"layer": 0, "expert": 3, "node": "press"}],
}


def write(tmp_path, document):
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def changed(**updates):
    return {**json.loads(json.dumps(GOOD)), **updates}


def faults(tmp_path, document):
    with pytest.raises(InvalidFile) as caught:
        load_topology(write(tmp_path, document))
    return caught.value.faults


def test_a_good_topology_is_read(tmp_path):
    topology = load_topology(write(tmp_path, GOOD))
    assert topology.node("gateway").memory.device == 5 << 20
    assert topology.links[0].latency == 0.002
    assert topology.node("press").memory.host == 0
    assert topology.replicas.required == 1
    assert Topology.model_validate_json(topology.model_dump_json()) == topology


def test_the_documented_example_is_read(tmp_path):
    document = changed(
        dtype="checkpoint",
        replicas={"minimum": 1, "survive": 0},
        trunk={"mode": "move"},
        quality={"budget": "0 %"},
        pins=[],
    )
    assert load_topology(write(tmp_path, document)).trunk.mode == "move"


def test_every_fault_is_told_at_once_with_its_line(tmp_path):
    document = changed()
    document["nodes"][0]["memory"] = {"device": "-5 MiB", "gpu": "3 MiB"}
    document["links"][0]["latency"] = 2
    document["surprise"] = 1
    found = faults(tmp_path, document)
    assert {f.key for f in found} == {"nodes[0].memory.device", "nodes[0].memory.gpu", "links[0].latency", "surprise"}
    assert all(f.line for f in found)
    text = (tmp_path / "topology.yaml").read_text().splitlines()
    by_key = {f.key: f for f in found}
    assert "gpu" in text[by_key["nodes[0].memory.gpu"].line - 1]
    assert "unknown key" in by_key["surprise"].message


LONG_PROMPTS = {
    **GOOD["nodes"][0],
    "ingress": {**GOOD["nodes"][0]["ingress"], "prompt_tokens": 500, "answer_tokens": 32},
}


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ({"links": []}, "no path between gateway and press"),
        ({"links": [{"between": ["gateway", "oven"], "latency": "1 ms", "bandwidth": "1 Gbit/s"}]}, "no node 'oven'"),
        ({"links": [GOOD["links"][0], {**GOOD["links"][0], "between": ["press", "gateway"]}]}, "declared twice"),
        ({"nodes": [GOOD["nodes"][0], {**GOOD["nodes"][1], "id": "gateway"}]}, "used twice"),
        ({"workloads": {}}, "workload 'code' has no trace"),
        ({"replicas": {"survive": 2}}, "asks for 3 nodes per expert"),
        ({"pins": [{"layer": 0, "expert": 0, "node": "oven"}]}, "no node 'oven'"),
        ({"nodes": [*GOOD["nodes"][1:], {"id": "x", "memory": {}}]}, "no node has an ingress"),
        (
            {
                "pins": [
                    {"layer": 0, "expert": 0, "node": "press"},
                    {"layer": 0, "expert": 0, "node": "press", "ban": True},
                ]
            },
            "both pinned to and banned",
        ),
        ({"pins": [{"layer": 0, "expert": 0, "node": n, "ban": True} for n in ("gateway", "press")]}, "lift a ban"),
        ({"nodes": [{"id": "two words", "memory": {}}]}, "pattern"),
        ({"context": {"tokens": 0}}, "greater than or equal to 1"),
        (
            {"context": {"tokens": 500}, "nodes": [LONG_PROMPTS, *GOOD["nodes"][1:]]},
            "prompt_tokens and answer_tokens together are 532, above context.tokens 500",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, updates, words):
    assert any(words in str(fault) for fault in faults(tmp_path, changed(**updates)))


def test_files_that_are_no_topology(tmp_path):
    path = tmp_path / "topology.yaml"
    for text, words in (
        ("a: [1", "line 1"),
        ("- 1\n", "keys and values"),
        ("", "keys and values"),
        ("a: 2020-01-01", "quote"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidFile, match=words):
            load_topology(path)
    with pytest.raises(InvalidFile, match="cannot be read"):
        load_topology(tmp_path / "absent.yaml")


def test_reachable_follows_links(tmp_path):
    topology = load_topology(write(tmp_path, GOOD))
    assert reachable(topology, "press") == {"gateway", "press"}
