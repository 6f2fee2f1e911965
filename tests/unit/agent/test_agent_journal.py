"""What an agent remembers: kill -9 between writing and acting, at every write, leads to the same state."""

import os
import sqlite3
import stat

import pytest

from agent import machine as m
from agent.budget import MemoryBudget
from agent.errors import JournalUnusable, JournalUnwritable
from agent.journal import Journal
from schemas import messages as msg
from schemas.topology import Context
from tests.small_plans import BYTES, CATALOGUE, LAYOUT, MODEL

BUDGET = MemoryBudget("a", msg.TierBytes(device=6 * BYTES), "device", MODEL, Context())


def assignment(epoch, experts):
    replicas = tuple(msg.AssignedReplica(record=CATALOGUE.records[e], tier="device") for e in experts)
    return msg.Assignment(
        cluster="test", plan=f"{epoch}" * 64, epoch=epoch, ingress=False, layout=LAYOUT, replicas=replicas
    )


class Agent:
    """Machine and journal; after `dies_after` writes the process is gone before it does anything else."""

    def __init__(self, path, dies_after):
        self.path, self.left = path, dies_after
        self.start()

    def start(self):
        self.journal = Journal(self.path, "a")
        self.machine = m.AgentMachine(self.journal.state, BUDGET)
        self.active = self.held = None
        self.run(m.Started())

    def run(self, event):
        queue = [event]
        while queue:
            for instruction in self.machine.handle(queue.pop(0)):
                match instruction:
                    case m.Persist(state):
                        self.journal.write(state)
                        self.left -= 1
                        if self.left == 0:
                            self.journal.close()
                            return self.start()
                    case m.Obtain():
                        self.held = {r.record.expert for a in instruction.assignments for r in a.replicas}
                        queue.append(m.Obtained(instruction.epoch, instruction.plan))
                    case m.Activate(given):
                        self.active = given.epoch
                    case m.Keep(assignments):
                        kept = {r.record.expert for a in assignments for r in a.replicas}
                        self.held = (self.held or set()) & kept
        return None

    def told(self, assignment):
        """Say what a coordinator says until the agent has retired the epoch."""
        epoch, plan = assignment.epoch, assignment.plan
        for _ in range(10):
            standing = self.machine.standing(None)
            if standing.retired == epoch == standing.active:
                return
            if standing.active == epoch:
                self.run(m.RetireReceived(epoch))
            elif standing.prepared == epoch:
                self.run(m.CommitReceived(epoch, plan))
            else:
                self.run(m.PrepareReceived(assignment))
        raise AssertionError(f"stuck at {self.machine.standing(None)}")


@pytest.mark.parametrize("dies_after", range(1, 10))
def test_killed_after_any_write_it_comes_to_the_same_state(tmp_path, dies_after):
    agent = Agent(tmp_path / "agent.journal", dies_after)
    for given in (assignment(1, [0, 1]), assignment(2, [1, 2])):
        agent.told(given)
    assert agent.active == 2
    assert agent.held == {1, 2}
    assert agent.journal.state == m.AgentState(cluster="test", active=assignment(2, [1, 2]), retired=2)
    agent.journal.close()


def test_a_journal_has_one_owner_at_a_time(tmp_path):
    journal = Journal(tmp_path / "j", "a")
    with pytest.raises(JournalUnusable, match="another agent runs on this data directory"):
        Journal(tmp_path / "j", "a")
    journal.write(m.AgentState(cluster="c"))
    journal.close()
    with pytest.raises(JournalUnusable, match="belongs to node 'a', this is 'b'"):
        Journal(tmp_path / "j", "b")
    again = Journal(tmp_path / "j", "a")  # nothing is left locked by those that were refused
    assert again.state.cluster == "c"
    again.close()


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 40])
def test_other_files_are_no_journals(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalUnusable, match="not a database"):
        Journal(tmp_path / "j", "a")


def test_a_state_of_another_version_is_told(tmp_path):
    Journal(tmp_path / "j", "a").close()
    database = sqlite3.connect(tmp_path / "j")
    database.execute("INSERT INTO state VALUES ('a', '{\"unheard\": 1}')")
    database.commit()
    database.close()
    with pytest.raises(JournalUnusable, match="another version"):
        Journal(tmp_path / "j", "a")


def test_what_cannot_be_written_changes_nothing(tmp_path):
    journal = Journal(tmp_path / "j", "a")
    journal.write(m.AgentState(cluster="c"))
    journal._database.execute("PRAGMA query_only=ON")
    with pytest.raises(JournalUnwritable, match="free some space"):
        journal.write(m.AgentState(cluster="d"))
    assert journal.state.cluster == "c"
    journal.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_ours(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(JournalUnusable, match="may write to"):
        Journal(tmp_path / "data" / "j", "a")
