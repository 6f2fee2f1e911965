"""When a slot may be overwritten: bookkeeping that needs no device."""

from runtime.cuda.copies import Fences


class Recorder:
    """Events are numbers."""

    def __init__(self) -> None:
        self.recorded = 0
        self.waited: list[int] = []

    def record(self) -> int:
        self.recorded += 1
        return self.recorded

    def fences(self) -> Fences[int]:
        return Fences(self.record, self.waited.append)


def test_a_copy_waits_for_the_last_that_read_its_slot_and_for_no_other() -> None:
    seen = Recorder()
    fences = seen.fences()
    fences.read([3, 4])
    fences.read([4])
    fences.claim(4)
    assert seen.waited == [2]
    fences.claim(4)
    fences.claim(7)
    assert seen.waited == [2]
    fences.claim(3)
    assert seen.waited == [2, 1]


def test_a_step_that_may_read_any_slot_is_waited_for_by_all() -> None:
    seen = Recorder()
    fences = seen.fences()
    fences.read([3])
    fences.read_all()
    fences.claim(3)
    fences.claim(5)
    assert seen.waited == [2]  # copies follow one another
    fences.read([5])
    fences.claim(5)
    assert seen.waited == [2, 3]


def test_nothing_read_records_nothing() -> None:
    seen = Recorder()
    seen.fences().read([])
    assert not seen.recorded
