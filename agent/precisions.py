"""In which precision a node holds experts in memory, and what one takes then: from its config and its journal.

Decides that an agent which follows plans begins with what its journal says, and that one whose config says another
precision starts only where its journal says the checkpoint's: of that any can be made, and fits. Must not know who asks
for which precision.
"""

import logging

from agent.budget import MemoryBudget
from agent.errors import DataUnusable
from agent.machine import AgentState
from agent.settings import Settings
from runtime.precision import UnfitPrecision, packed_layout
from schemas.messages import TierBytes
from schemas.model import ModelSpec
from schemas.precision import LOW_PRECISIONS, Precision
from schemas.store import RecordLayout

log = logging.getLogger(__name__)


def make_budget(settings: Settings, spec: ModelSpec, layout: RecordLayout, state: AgentState) -> MemoryBudget:
    """Return what a node may use, and how it holds experts at first.

    Raises
    ------
    UnfitPrecision
        The config's precision does not fit the model.
    DataUnusable
        What the journal says is here is in a low precision, and the config asks for another.
    """
    memory = TierBytes(device=settings.memory.device, host=settings.memory.host, disk=settings.memory.disk)
    sizes = _sizes(layout)
    for precision in LOW_PRECISIONS:
        if precision == settings.precision:
            packed_layout(layout, precision)  # raises where it does not fit
    offers: tuple[Precision, ...] = tuple(sizes) if settings.precision == "plan" else (settings.precision,)
    return MemoryBudget(
        settings.node,
        memory,
        "device" if memory.device else "host",
        spec,
        settings.context,
        precision=_first(settings, state, offers),
        offers=offers,
        sizes=sizes,
    )


def _sizes(layout: RecordLayout) -> dict[Precision, int]:
    """Return the bytes of an expert in memory by precision, the most bits first, without what does not fit."""
    found: dict[Precision, int] = {"checkpoint": layout.bytes}
    for low in LOW_PRECISIONS:
        try:
            found[low] = packed_layout(layout, low).bytes
        except UnfitPrecision:
            continue
    return found


def _first(settings: Settings, state: AgentState, offers: tuple[Precision, ...]) -> Precision:
    known = (state.active, *state.kept)
    said = next((each.precision for each in known if each is not None and each.precision is not None), None)
    if said is None or said in offers:
        return said or offers[0]
    if said != "checkpoint":
        raise DataUnusable(
            f"{settings.data}: holds experts in {said} under the plan in force, the config says precision: "
            f"{settings.precision}; say {said} or plan there, or give the agent an empty data directory"
        )
    log.warning("the plan in force wants experts in %s; they are held in %s until the next one", said, offers[0])
    return offers[0]
