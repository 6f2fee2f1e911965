"""A step whose device brings what its layers lack by itself: what the host does meanwhile.

Decides which slots the device may fill next, and follows in the books what it did with them. The host is needed where
spares run out, or a record is not in host memory yet: the device waits in that layer then. Flow: spares → the step is
launched → layer by layer, what was chosen, begun ahead and ended is read → copies given out. Axes: B tokens, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Final, NamedTuple

from runtime.copies import Copy
from runtime.cuda.buffers import Chosen
from runtime.cuda.following import Beside, Following
from runtime.cuda.runners import supply_of
from runtime.cuda.supply import NEAR, Spares
from runtime.cuda.table import HostTable, lacking
from runtime.errors import ExpertUnavailable
from schemas.topology import Tier

_SHARE: Final = 24  # one of so many slots is spare
_PUNCTUAL: Final = 3
"""Last layers of a step that the host does nothing else beside which takes long: the next step waits for it then."""


def spare_slots(slots: int, most: int) -> int:
    """Return how many slots are kept spare: enough for a layer's lack, but few of those that there are.

    Parameters
    ----------
    most
        Experts that a layer may choose.

    >>> spare_slots(384, 6), spare_slots(64, 6), spare_slots(8, 2)
    (16, 5, 0)
    """
    return max(slots // _SHARE, min(most, slots // 12))


class _Guess(NamedTuple):
    """The slot that a guess is brought to, and its place among those of its layer."""

    slot: int
    place: int


@dataclass
class _Layer:
    """What a layer got: experts it had lacked, with the slots that they were brought to, and guesses."""

    index: int
    chosen: Chosen
    brought: dict[int, int] = field(default_factory=dict)
    guesses: dict[int, _Guess] = field(default_factory=dict)


class DeviceStep(Following):
    """What the host does while one step runs.

    Parameters
    ----------
    spares
        Those that the step before has left; modified.
    """

    def __init__(self, beside: Beside, hosted: HostTable, spares: Spares) -> None:
        super().__init__(beside)
        self._hosted = hosted
        supply = supply_of(beside.runner.buffers)
        self._own_hosted, self._own_spares = supply.own_hosted.numpy(), supply.own_spares.numpy()
        self._gates = beside.runner.buffers.mail.weights.numpy()
        self._spares = spares
        self._most = self._rows * self._top_k
        self._level = spare_slots(self._bringer.inside.pool.slots, self._most)
        self._open: _Layer | None = None
        self._far: dict[int, _Guess] = {}  # begun for the layer after the next to choose

    def begin(self) -> int:
        """Let the device have spares, and know what is in host memory. Modifies."""
        short = self._level - len(self._spares)  # some may be left of the step before
        if short > 0:
            with self._bringer.inside.changed:
                self._spares.append(self._bringer.rooms.take(self._first + self._layers - 1, short))
        self._tell_hosted()
        self._offer()
        return self._spares.position

    def serve(self, index: int) -> None:
        """Follow what the device does in a layer that has chosen, and help where it needs that."""
        is_near_end = index >= self._layers - _PUNCTUAL
        chosen = self._runner.chosen(index, self._stamp, self._count_one if is_near_end else self._catch_up)
        if index == 0:
            self._bringer.end_sources()  # the device has come past whatever was copied in the step before
        layer = _Layer(index, chosen)
        if index:
            layer.guesses, self._far = self._guesses_of(index)
            self._settle()
        self._open = layer
        absent = lacking(chosen)
        if absent:
            self._supply_layer(layer, absent)
        self._replenish(layer)
        gates, number = self._gates[index].copy(), self._first + index
        self._pending.append(partial(self._tally.observe, index, chosen.experts, gates))
        self._pending.append(partial(self._bringer.learn, number))
        self._pending.append(partial(self._bringer.prepare, number, self._most))

    def _guesses_of(self, index: int) -> tuple[dict[int, _Guess], dict[int, _Guess]]:
        """Return what was begun for a layer, and by the one before it for the one after; in the order of spares."""
        near, far = self._far, dict[int, _Guess]()
        for place, expert in enumerate(self._runner.begun(index - 1, self._stamp)):
            if expert is not None:
                (near if place < NEAR else far)[expert] = _Guess(self._spares.take(1)[0], place)
        return near, far

    def settle(self) -> None:
        """Note what came of the last layer. Modifies."""
        self._settle()
        self._table.is_new = True  # the device has changed its own

    def finish(self) -> None:
        """Count what has not been counted yet. Modifies."""
        super().finish()
        while len(self._pending) > 6 * self._layers:  # else there is time for it in the next step
            self._pending.popleft()()

    def close(self) -> None:
        """Give back spares, and of a step that failed what was not settled; no layer takes any more. Modifies."""
        shelf, left = self._bringer.inside.shelf, self._spares.recall()
        if self._open is not None:
            left += [*self._open.brought.values(), *(each.slot for each in self._open.guesses.values())]
            self._open = None
        left += [each.slot for each in self._far.values()]
        self._far = {}
        with self._bringer.inside.changed:
            for slot in left:
                shelf.vacate("device", slot)
        self._table.is_new = True  # the device has changed its own

    def _catch_up(self) -> bool:
        work = self._counting or self._pending
        if work:
            work.popleft()()
        return bool(work)

    def _count_one(self) -> bool:
        if is_any := bool(self._counting):
            self._counting.popleft()()
        return is_any

    def _supply_layer(self, layer: _Layer, absent: Sequence[int]) -> None:
        """See that the device can bring what a layer lacks, and note which slots it takes. Modifies."""
        number, began = self._first + layer.index, perf_counter()
        fresh = [expert for expert in absent if expert not in layer.guesses]
        if len(fresh) > len(self._spares):
            self._make_room(number, layer.chosen, len(fresh) - len(self._spares))
        if (self._hosted.slots[layer.index, absent] < 0).any():
            self._bring_to_host(number, absent)
            self._tell_hosted()
        if self._spares.position + len(fresh) > self._spares.offered[1]:
            self._offer()  # slots that guesses gave back are spare, but the device has not heard of them yet
        layer.brought = dict(zip(fresh, self._spares.take(len(fresh)), strict=True))
        self._note_loads(number, len(absent), began)

    def _make_room(self, number: int, chosen: Chosen, count: int) -> None:
        """Let the device, which waits, have more spares: slots of any layer. Modifies."""
        shelf, changed = self._bringer.inside.shelf, self._bringer.inside.changed
        with changed:
            used = self._bringer.use_ready(number, set(chosen.experts[chosen.found].tolist()))
            try:
                slots = self._bringer.slots(number, count)
            finally:
                shelf.end_use(used)
        self._runner.tell(self._table.take())
        self._runner.flush()  # before spares come, behind which it looks other experts up
        self._spares.append(slots)
        self._offer()

    def _bring_to_host(self, number: int, experts: Sequence[int]) -> None:
        """Read what the device waits for into host memory, where others make room. Modifies."""
        shelf, changed, kept = self._bringer.inside.shelf, self._bringer.inside.changed, list[Copy]()
        is_absent = self._hosted.slots[number - self._first] < 0
        try:
            for expert in sorted(experts, key=lambda expert: bool(is_absent[expert])):  # none makes room for another
                with changed:
                    host, is_new = self._host_copy(number, expert)
                    shelf.use(host)
                    kept.append(host)
                if is_new:
                    self._bringer.inside.loader.read_host(host)
        finally:
            with changed:
                shelf.end_use(kept)

    def _host_copy(self, number: int, expert: int) -> tuple[Copy, bool]:
        """Return the copy of an expert in host memory, and whether it is to be filled; the lock is held. Modifies."""
        shelf, key = self._bringer.inside.shelf, (number, expert)
        while True:
            host = shelf.copies.get((key, "host"))
            if host is not None and host.is_ready:
                return host, False
            if host is None and not shelf.can_load(key):
                raise ExpertUnavailable(number, expert, "this node")
            if host is None:
                with shelf.thawed():  # the device waits, and reads nothing meanwhile
                    slot = shelf.room_in("host", number)
                if slot is not None:
                    return shelf.occupy(key, "host", slot), True
            self._bringer.inside.changed.wait(0.05)

    def _tell_hosted(self) -> None:
        if self._hosted.is_new:
            self._own_hosted[:] = self._hosted.take()
            self._runner.tell_hosted()

    def _replenish(self, layer: _Layer) -> None:
        """Let there be spares again, where few are left: of layers that this step has passed. Modifies.

        Before the last layer as many as the next step begins with: it begins as soon as that layer has chosen.
        """
        if layer.index == self._layers - 1:
            return
        short = self._level - len(self._spares)
        if short and (2 * short >= self._level or layer.index == self._layers - 2):
            number, rooms = self._first + layer.index, self._bringer.rooms
            with self._bringer.inside.changed:
                rooms.replenish(number, short, set(layer.chosen.experts.ravel().tolist()))
                self._spares.append(rooms.take_free(short))
        self._offer()

    def _offer(self) -> None:
        """Let the device have what spares are new, guesses but for those that the next layer may lack."""
        limit = self._spares.end - min(self._most, self._level // 3) if self._looks_ahead else 0
        if (limit, self._spares.end) != self._spares.offered:
            self._spares.offered = limit, self._spares.end
            self._own_spares[-1] = limit
            self._runner.offer()

    def _settle(self) -> None:
        """Note what came of the layer before, which is over. Modifies."""
        layer = self._open
        if layer is None:
            return
        late: dict[int, Tier] = dict.fromkeys(lacking(layer.chosen), "host")
        self._counting.append(partial(self._tally.count, layer.index, layer.chosen.experts, late))
        if layer.brought or layer.guesses or layer.index == self._layers - 1:
            shares = self._runner.ended(layer.index, self._stamp)
            with self._bringer.inside.changed:
                for expert, slot in layer.brought.items():
                    self._own(layer.index, expert, slot)
                self._settle_guesses(layer, shares)
        self._open = None

    def _settle_guesses(self, layer: _Layer, shares: Sequence[float]) -> None:
        """Note what came of guesses, of which such shares were there in time; the lock is held. Modifies."""
        number, counts = self._first + layer.index, self._bringer.residency.counts
        for expert, (slot, place) in layer.guesses.items():
            share = shares[place]
            is_true = bool((layer.chosen.experts == expert).any())
            if share:
                self._bringer.inside.shelf.slack.observe_guesses(1, int(is_true))
                counts.prefetched[number] += 1
                counts.prefetch_hits[number] += is_true
            if is_true or share == 1:
                self._own(layer.index, expert, slot)
            else:
                counts.load_bytes[number] += int(share * self._bringer.inside.pool.stride)
                self._spares.append([slot])

    def _own(self, index: int, expert: int, slot: int) -> None:
        """Note a copy that the device has made; the lock is held. Modifies."""
        shelf, key = self._bringer.inside.shelf, (self._first + index, expert)
        self._bringer.residency.counts.load(key[0], self._bringer.residency.layout.bytes)
        host = shelf.copies.get((key, "host"))
        if host is not None and index == self._layers - 1:  # the device may still read it
            shelf.use(host)
            self._bringer.keep_source(host)
        if (key, "device") in shelf.copies:  # others have loaded it meanwhile
            self._spares.append([slot])
            return
        copy = shelf.occupy(key, "device", slot)
        copy.found = "host"
        shelf.finish(copy)
