"""How many experts to bring in before they are asked for: as many as the link has time for, and none where it has none.

Decides from measured times only: what computing a layer takes is time in which the link is idle, unless it is busy with
what was asked for. Must not know clocks or which experts are guessed.
"""

from dataclasses import dataclass, field
from typing import Final

_FADE: Final = 0.95
_HANDOVER_S: Final = 2e-3  # quicker loads are best made by who needs them: threads that share two cores cost more
_TRUSTED: Final = 0.5  # share of guesses that must come true
_FEW: Final = 32
_SAVES: Final = 0.8  # what a load in low precision may take of another: the choice costs something too
_RETRY: Final = 256  # layers
_OUTLYING: Final = 3.0
_EXPECTED: Final = 0.85  # of the guesses come true (RUNTIME.md: 81 to 89 %)


@dataclass
class Slack:
    """Moving averages of a link and of the layers that ask it for experts. Not thread-safe.

    Attributes
    ----------
    load_s
        One load.
    low_load_s
        One load of a low-precision copy.
    idle_s
        Time between two layers in which nobody waits for a load.
    """

    load_s: float = 0.0
    low_load_s: float = 0.0
    idle_s: float = 0.0
    guesses: int = 0
    came_true: int = 0
    _is_new: bool = field(default=True, repr=False)
    _low_loads: int = field(default=0, repr=False)
    _low_asked: int = field(default=0, repr=False)

    def observe_load(self, seconds: float, *, is_low: bool = False) -> None:
        """Note how long a load took, of a low-precision copy perhaps. Modifies."""
        if is_low:
            self._low_loads += 1
            if self._low_loads > _FEW:
                seconds = min(seconds, _OUTLYING * self.low_load_s)  # one that was interrupted says nothing of the rest
            weight = max(1 - _FADE, 1 / self._low_loads)  # the first few are slower than those to come
            self.low_load_s += weight * (seconds - self.low_load_s)
        else:
            self.load_s = _faded(self.load_s, seconds)

    def prefers_low(self) -> bool:
        """Whether a missing expert that will do in low precision is loaded so: where that is done sooner. Modifies.

        Unpacking costs what a quick disk would take for the rest of the bytes. Every so often it is tried all the same,
        since times change.
        """
        self._low_asked += 1
        is_known = self._low_loads >= _FEW and self.load_s > 0
        return not is_known or self.low_load_s < _SAVES * self.load_s or self._low_asked % _RETRY == 0

    def observe_layer(self, seconds: float, waited_s: float) -> None:
        """Note the time since the layer before, and how much of it was waited for loads. Modifies."""
        idle = max(0.0, seconds - waited_s)
        self.idle_s = idle if self._is_new else _FADE * self.idle_s + (1 - _FADE) * idle
        self._is_new = False

    def observe_guesses(self, made: int, came_true: int) -> None:
        """Note guesses and those that were asked for. Modifies; old ones fade."""
        self.guesses += made
        self.came_true += came_true
        if self.guesses > 4096:
            self.guesses //= 2
            self.came_true //= 2

    @property
    def is_slow(self) -> bool:
        """Whether loads take so long that another thread should make them."""
        return self.load_s > _HANDOVER_S

    @property
    def is_trusted(self) -> bool:
        """Whether guesses come true, as far as is known."""
        return self.true_share >= _TRUSTED

    @property
    def true_share(self) -> float:
        """Share of guesses that came true, as far as is known."""
        return self.came_true / self.guesses if self.guesses >= _FEW else _EXPECTED

    @property
    def pays(self) -> bool:
        """Whether a load that is begun while the device works saves more than it costs, as far as is known.

        A guess that comes true hides, of its load, at most the time that a layer takes; one that does not keeps the
        link from what is asked for.

        >>> Slack(load_s=1.7e-4, idle_s=6e-5).pays, Slack(load_s=7e-3, idle_s=2e-4).pays
        (True, False)
        """
        share = self.true_share
        return share * min(self.load_s, self.idle_s) > (1 - share) * self.load_s

    @property
    def room(self) -> int:
        """Loads that fit into a layer's idle time; 0 where guesses do not come true.

        >>> Slack(load_s=0.010, idle_s=0.035).room
        3
        """
        if not self.is_slow or not self.is_trusted:
            return 0
        return int(self.idle_s / self.load_s)


def _faded(average: float, seconds: float) -> float:
    return _FADE * average + (1 - _FADE) * seconds if average else seconds
