import json
import os

import pytest

from schemas.base import canonical_json
from schemas.files import CannotWrite, InvalidFile, write_atomic
from schemas.model import ModelSpec
from schemas.placement import Replica
from schemas.plan import Plan, Segment, Step, Summary, TrunkPath, load_plan, write_plan

SPEC = ModelSpec(id="tiny", layers=1, experts=2, top_k=1, hidden_size=4, itemsize=4, expert_bytes=64)


def make_plan():
    return Plan(
        cluster="c",
        coordinator="127.0.0.1:7400",
        base_epoch=0,
        epoch=1,
        model=SPEC,
        dtype="float32",
        placement=(Replica(layer=0, expert=0, node="a"), Replica(layer=0, expert=1, node="b", tier="host")),
        trunk=(TrunkPath(ingress="a", segments=(Segment(node="a", first_layer=0, last_layer=0),)),),
        steps=(Step(stage=1, action="replicate", layer=0, expert=0, node="a", tier="device", bytes=64),),
        summary=Summary(status="optimal", solver="milp", objective_name="additive-latency", objective=0.1, seconds=0.2),
    )


def test_a_plan_survives_the_file(tmp_path):
    write_plan(tmp_path / "plan.json", make_plan())
    assert load_plan(tmp_path / "plan.json") == make_plan().sealed()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_the_digest_is_of_the_meaning_not_of_the_layout(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(canonical_json(make_plan().sealed().model_dump(mode="json")))
    assert load_plan(path).digest == make_plan().sealed().digest


@pytest.mark.parametrize("field", ["placement", "epoch", "summary", "digest"])
def test_an_altered_plan_is_refused(tmp_path, field):
    document = make_plan().sealed().model_dump(mode="json")
    changes = {"placement": document["placement"][:1], "epoch": 2, "digest": "0" * 64}
    changes["summary"] = {**document["summary"], "objective": 0.0}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**document, field: changes[field]}))
    with pytest.raises(InvalidFile, match="altered"):
        load_plan(path)


def test_a_plan_of_another_format_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**make_plan().sealed().model_dump(mode="json"), "format": "expertmesh-plan-9"}))
    with pytest.raises(InvalidFile, match="format"):
        load_plan(path)


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_write_atomic_names_the_file_that_cannot_be_written(tmp_path):
    path = tmp_path / "absent" / "plan.json"
    with pytest.raises(CannotWrite, match=r"absent/plan\.json: cannot be written: No such file or directory"):
        write_atomic(path, "x")
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_replaces_neither_pipes_nor_links(tmp_path):
    """As /dev/null and /dev/stdout are named by whoever wants nothing kept, or all in a pipe."""
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomic(pipe, "through")
        assert os.read(reader, 99) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    link.symlink_to(file)
    write_atomic(link, "behind")
    assert (link.is_symlink(), file.read_text()) == (True, "behind")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link", "pipe"]
