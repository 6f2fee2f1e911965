"""How the budget that is left beside what was put is run as a cache."""

from dataclasses import dataclass

from runtime.policy.eviction import EVICTIONS, Deferred
from runtime.policy.uses import LearnedUses, Uses


@dataclass(frozen=True)
class Caching:
    """That budget which is left is a cache, and how it is run.

    Attributes
    ----------
    layers, experts
        Of the model.
    eviction
        A name of `runtime.policy.eviction.EVICTIONS`.
    uses
        What evicts instead, where it was learnt for this model.
    prefetch
        Load what the next layer will probably ask for, where the link has time.
    workers
        Threads that load beside the one that computes.
    in_place
        Let the processor compute an expert in host memory where that is quicker than to bring it to its device: it
        rounds otherwise than the device does.
    """

    layers: int
    experts: int
    eviction: str = "rates"
    uses: Uses | None = None
    prefetch: bool = True
    workers: int = 2
    in_place: bool = True

    def policy(self) -> Deferred:
        """Return the eviction policy, which knows nothing yet."""
        if self.uses is not None:
            return Deferred(LearnedUses(self.uses))
        return Deferred(EVICTIONS[self.eviction](self.layers, self.experts))
