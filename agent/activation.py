"""What a node does when an epoch comes into force: whom it asks for experts, what it gives up, which way tokens go.

Decides nothing about epochs: it makes of an assignment the routes of this node's steps, the guests that may be cached
here, what the quality budget allows with what is at hand, and the path of the tokens that enter here. Must not know
when an epoch comes, nor the coordinator.
"""

import logging

from agent.budget import MemoryBudget
from agent.holdings import Holdings
from agent.layers import Layers
from agent.quality import QualityBudget
from agent.ring import Way
from agent.routes import EpochRoutes, at_hand, epoch_routes
from agent.settings import Settings
from runtime.importance import Importance
from runtime.routing import EpochBoard, Routing
from schemas.messages import Assignment
from schemas.model import ModelSpec
from schemas.paths import layers_run

log = logging.getLogger(__name__)


class Activation:
    """The epoch in force at one node. One thread activates, others read.

    Attributes
    ----------
    board
        Tells steps their routing, and which epochs they use.
    routes
        Of the epoch in force; replaced whole.
    """

    def __init__(self, settings: Settings, spec: ModelSpec, *, holdings: Holdings, quality: QualityBudget) -> None:
        self._settings = settings
        self._spec = spec
        self._holdings = holdings
        self._quality = quality
        nothing = Routing.build(0, layers=spec.layers, experts=spec.experts, local=())
        self.board = EpochBoard(nothing)
        self.routes = EpochRoutes(nothing, {}, frozenset())

    def activate(self, assignment: Assignment, layers: Layers, budget: MemoryBudget) -> None:
        """Let steps that begin from now on use an assignment. Modifies."""
        log.info("epoch %d is active", assignment.epoch)
        shape = {"layers": self._spec.layers, "experts": self._spec.experts}
        self.routes = epoch_routes(assignment, self._settings.node, **shape)
        self.board.install(self.routes.routing)
        self.invite(assignment)
        layers.spend(self._spending(assignment, budget))
        layers.activate(assignment)

    def invite(self, active: Assignment) -> None:
        """Let what others compute for this node be cached here, where the config allows it. Modifies."""
        if self._settings.peer_cache:
            me, named = self._settings.node, [hop for hop in active.routing if hop.sha256]
            others = [hop.model_copy(update={"holders": tuple(h for h in hop.holders if h != me)}) for hop in named]
            self._holdings.invite(hop for hop in others if hop.holders)

    def _spending(self, assignment: Assignment, budget: MemoryBudget) -> Importance | None:
        """Return what decode steps may give up under an assignment."""
        runs = layers_run(self._settings.node, budget.paths(assignment))
        layers = [layer for layer, decoder in enumerate(self._spec.moe_layer_indices) if decoder in runs]
        here = at_hand(assignment, self.routes.routing, layers)
        is_paid = assignment.precision is not None  # such plans say what their precisions leave of the budget
        return self._quality.activate(assignment.quality_budget, here, budget.precision, is_paid=is_paid).importance

    def way(self, layers: Layers, *, has_epoch: bool) -> Way:
        """Return the path of tokens that enter here; none in a process that has yet to fetch what its epoch gives."""
        if layers.way.epoch == 0 and has_epoch:
            why_not = f"{self._settings.node} was restarted and is fetching its experts; try again in a moment"
            return Way(0, None, why_not)
        return layers.way
