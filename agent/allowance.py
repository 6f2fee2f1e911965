"""How much of the device this node may take now, and what that leaves for experts beside trunk and KV cache.

Decides the least that makes sense: trunk, KV cache and the experts that one token needs in one layer. What a plan puts
on the device beyond the budget stays on this node's disk and is loaded when it is asked for. Must not know who changes
the budget.
"""

import logging
import threading
from collections.abc import Collection
from dataclasses import replace

from agent.budget import MemoryBudget
from runtime.errors import BudgetTooSmall
from runtime.slots import Residency
from schemas.messages import Assignment
from schemas.topology import Tier
from schemas.units import format_bytes

log = logging.getLogger(__name__)


class Allowance:
    """The device budget in force. Thread-safe.

    Parameters
    ----------
    device
        Bytes of the device to begin with; what the config gives to ExpertMesh if None. Never more than that.

    Attributes
    ----------
    residency
        Where experts are; may be replaced.
    """

    def __init__(self, residency: Residency, budget: MemoryBudget, device: int | None) -> None:
        self.residency = residency
        self._budget = budget
        self._lock = threading.Lock()
        self._assignments: Collection[Assignment] = ()
        self._device = budget.memory.device if device is None else min(device, budget.memory.device)
        if device is not None:
            self._require(self._device)

    def change(self, device: int) -> int:
        """Let the device take so many bytes from now on; returns what is in force.

        Raises
        ------
        BudgetTooSmall
            One layer's experts of one token would not fit, or what lies nowhere else. Nothing changes.
        """
        with self._lock:
            device = min(device, self._budget.memory.device)
            self._require(device)
            self.residency.set_budget("device", self._left("device", device))
            self._device = device
        log.info("the device budget is %s", format_bytes(device))
        return device

    def limit(self, device: int) -> None:
        """Take no more of the device from now on, however little that is. Modifies."""
        with self._lock:
            memory = self._budget.memory
            self._budget = replace(self._budget, memory=memory.model_copy(update={"device": device}))
            self._device = min(self._device, device)

    def fit(self, assignments: Collection[Assignment]) -> None:
        """Leave room for the trunk and KV cache of these assignments together."""
        with self._lock:
            self._assignments = assignments
            budgets: tuple[tuple[Tier, int], ...] = (("device", self._device), ("host", self._budget.memory.host))
            for tier, memory in budgets:
                try:
                    self.residency.set_budget(tier, self._left(tier, memory))
                except BudgetTooSmall as error:
                    log.warning("%s", error)

    def _left(self, tier: str, memory: int) -> int:
        """Return what trunk and KV cache leave of a tier."""
        taken = self._budget.path_memory(self._assignments).total if tier == self._budget.trunk_tier else 0
        return max(0, memory - taken)

    def _require(self, device: int) -> None:
        spec, expert_bytes = self._budget.spec, self.residency.slot_bytes
        trunk = self._budget.path_memory(self._assignments).total if self._budget.trunk_tier == "device" else 0
        experts = spec.top_k * expert_bytes
        if device < trunk + experts:
            why = (
                f"{spec.top_k} experts of {format_bytes(expert_bytes)} that a token needs in a layer"
                f"{f', and {format_bytes(trunk)} for trunk and KV cache' if trunk else ''}"
            )
            raise BudgetTooSmall("device", budget=device, needed=trunk + experts, why=why)
