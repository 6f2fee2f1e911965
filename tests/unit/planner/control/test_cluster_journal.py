"""What a coordinator remembers."""

import pytest

from planner.control.errors import JournalUnusable, JournalUnwritable
from planner.control.journal import Journal
from planner.control.state import ClusterState
from tests.small_plans import all_on, path, plan_through, replicas


def test_a_state_comes_back_whole(tmp_path):
    placed = replicas(all_on("a"))
    plan = plan_through(placed)
    state = ClusterState(cluster="c", epoch=1, placement=placed, plan=plan, committed_plan=plan, phase="done")
    with Journal(tmp_path / "j", "c") as journal:
        journal.write(state)
    with Journal(tmp_path / "j", "c") as journal:
        assert journal.state == state


def test_a_journal_has_one_owner_and_one_cluster(tmp_path):
    with Journal(tmp_path / "j", "c") as journal:
        journal.write(ClusterState(cluster="c"))
        with pytest.raises(JournalUnusable, match="another planner serve runs with it"):
            Journal(tmp_path / "j", "c")
    with pytest.raises(JournalUnusable, match="journal of cluster 'c', not of 'd'"):
        Journal(tmp_path / "j", "d")
    with Journal(tmp_path / "j", "c") as journal:
        assert journal.state.cluster == "c"


def test_what_cannot_be_written_changes_nothing(tmp_path):
    with Journal(tmp_path / "j", "c") as journal:
        journal.write(ClusterState(cluster="c", epoch=1))
        journal._database.execute("PRAGMA query_only=ON")
        with pytest.raises(JournalUnwritable, match="free some space"):
            journal.write(ClusterState(cluster="c", epoch=2))
        journal._database.execute("PRAGMA query_only=OFF")
        assert journal.state.epoch == 1
        journal.write(ClusterState(cluster="c", epoch=3))  # no transaction is left open
    with Journal(tmp_path / "j", "c") as journal:
        assert journal.state.epoch == 3


def test_the_story_stays_short(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.control.journal._STORY_LENGTH", 3)
    with Journal(tmp_path / "j", "c") as journal:
        for epoch in range(6):
            journal.write(ClusterState(cluster="c", epoch=epoch))
        rows = journal._database.execute("SELECT epoch FROM story ORDER BY number").fetchall()
    assert rows == [(3,), (4,), (5,)]


def test_a_journal_of_before_paths_were_remembered_has_those_of_its_plan(tmp_path):
    placed = replicas(all_on("a", "b"))
    plan = plan_through(placed, trunk=[path("a", "a", "b")])
    old = ClusterState(cluster="c", epoch=1, placement=placed, plan=plan, committed_plan=plan, phase="done")
    with Journal(tmp_path / "j", "c") as journal:
        journal.write(old)
        text = old.model_dump_json(exclude={"trunk"})
        journal._database.execute("UPDATE state SET json = ?", (text,))
    with Journal(tmp_path / "j", "c") as journal:
        assert journal.state.paths == plan.trunk
    assert ClusterState(cluster="c").paths == ()
