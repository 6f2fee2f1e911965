"""agent.yaml: what one agent may use, where it listens and whom it obeys.

Decides defaults, where a calibration lies that is not named, and turns paths relative to the file into absolute ones.
Must not know what is done with them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from runtime.reads import ReadWay
from schemas.address import InvalidAddress, parse_address, require_loopback
from schemas.base import FrozenModel
from schemas.files import Fault, load_yaml
from schemas.model import HeldDtype
from schemas.precision import LowPrecision, Precision
from schemas.topology import DEFAULT_COORDINATOR_PORT, Context, Memory, NodeId
from schemas.units import Bytes, Share

EvictionName = Literal["rates", "steady", "cost-aware", "cyclfu", "least-stale", "score", "lfu", "lru"]
PortOrAny = Annotated[int, Field(ge=0, le=65535)]


class Ports(FrozenModel):
    """Ports of the four planes; 0 takes a free one."""

    expert: PortOrAny = 0
    weights: PortOrAny = 0
    client: PortOrAny = 0
    session: PortOrAny = 0


class OwnQuality(FrozenModel):
    """What substitution of experts may cost at this agent.

    Attributes
    ----------
    budget
        Rise of perplexity; the plan's where nothing is said, and this one's own word where something is.
    calibration
        A file of `agent calibrate`; by default ``calibration-NODE.json`` or ``calibration.json`` in the store or model.
    """

    budget: Share | None = None
    calibration: str | None = None


class Settings(FrozenModel):
    """One agent's config file.

    Attributes
    ----------
    model
        The checkpoint directory, a store, or a copy of a store without its records: its trunk then comes from peers.
    store
        A directory made by `agent prepare`; an agent with one is where the others get their first weights.
    data
        Where the agent keeps its journal and records.
    memory, context, dtype
        As in the topology. Trunk and KV cache of the layers that run here are taken from `memory` too.
    torch_device
        Where trunk and experts are computed: cpu, cuda or cuda:1. `memory.device` is then that device's memory, and
        what is in `memory.host` is pinned for it. A device that cannot be used is told of, and the processor computes.
    device_budget
        Less of the device than `memory` tells the planner: experts beyond it are loaded when they are asked for.
    peer_cache
        Cache experts of other nodes, too, where the plan leaves memory free and calls cost more than bringing them.
    eviction, prefetch
        Of experts that are cached in memory which the plan leaves free.
    predictor
        A file of `agent learn` that guesses what to load ahead; by default the next layer's gate does.
    uses
        A file of `agent learn --kind uses`, by which cached experts make room instead of by `eviction`.
    reads
        How records come from this node's disk: through the page cache, which takes what memory is free besides, or past
        it.
    in_place
        Let the processor compute experts that lie in `memory.host` beside a CUDA device, where that is done sooner than
        bringing them there. It rounds otherwise than the device; answers that combine in order never do it.
    precision
        In which this node holds and executes every expert, whoever asks for it: in int8 or int4 more of them fit into
        the same memory, and text changes as `agent calibrate` tells, which a quality budget pays for first; `plan`: in
        that of the plan which gives it its first experts. Where the topology does not say so, what the plan places here
        is counted in the checkpoint's, and what that leaves free is cache. Records travel, and lie on disk, in the
        checkpoint's.
    low_precision
        In which a missing expert may be loaded instead, where the quality budget allows that.
    quality
        What substitution of experts may cost; exact where neither this nor the plan gives a budget.
    threads
        Threads that torch may use in one operation.
    call_timeout_s, absence_timeout_s
        How long an expert call may take, and how long a holder without a replica elsewhere, or a node of a token's
        path, may be away.
    """

    node: NodeId
    coordinator: str = f"127.0.0.1:{DEFAULT_COORDINATOR_PORT}"
    address: str = "127.0.0.1"
    ports: Ports = Ports()
    model: str
    store: str | None = None
    data: str
    memory: Memory
    context: Context = Context()
    dtype: HeldDtype = "checkpoint"
    torch_device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    device_budget: Bytes | None = None
    eviction: EvictionName = "rates"
    prefetch: bool = True
    predictor: str | None = None
    uses: str | None = None
    reads: ReadWay = "cached"
    peer_cache: bool = True
    in_place: bool = True
    precision: Literal[Precision, "plan"] = "checkpoint"
    low_precision: LowPrecision | None = None
    quality: OwnQuality = OwnQuality()
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    call_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    absence_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0


def load_settings(path: Path) -> Settings:
    """Read a config file; raises `InvalidFile` with every fault. Paths come back absolute."""
    base = path.resolve().parent

    def faults(settings: Settings) -> Iterator[Fault]:
        yield from settings_faults(settings)
        if settings.quality.budget and calibration_of(_absolute(settings, base)) is None:
            yield Fault("quality.budget", "needs a calibration: name a file of agent calibrate as quality.calibration")

    return _absolute(load_yaml(path, Settings, faults), base)


def _absolute(settings: Settings, base: Path) -> Settings:
    """Return settings whose paths are no longer relative to `base`."""
    store = str(base / settings.store) if settings.store is not None else None
    calibration = settings.quality.calibration
    quality = settings.quality.model_copy(update={"calibration": str(base / calibration) if calibration else None})
    absolute = {
        "quality": quality,
        "model": str(base / settings.model),
        "data": str(base / settings.data),
        "predictor": str(base / settings.predictor) if settings.predictor is not None else None,
        "uses": str(base / settings.uses) if settings.uses is not None else None,
        "store": store,
    }
    return settings.model_copy(update=absolute)


def calibration_of(settings: Settings) -> Path | None:
    """Return the calibration that is named, or else the first that is there; None where there is none."""
    if settings.quality.calibration is not None:
        return Path(settings.quality.calibration)
    places = [Path(place) for place in (settings.store, settings.model) if place]
    names = (f"calibration-{settings.node}.json", "calibration.json")
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


def settings_faults(settings: Settings) -> Iterator[Fault]:
    """Yield what in a well-formed config cannot be meant."""
    try:
        require_loopback(settings.address)
    except InvalidAddress as error:
        yield Fault("address", str(error))
    try:
        require_loopback(parse_address(settings.coordinator).host)
    except InvalidAddress as error:
        yield Fault("coordinator", str(error))
    memory = settings.memory
    if memory.device + memory.host + memory.disk == 0:
        yield Fault("memory", "allows nothing: device, host and disk are all 0 bytes; give at least one")
    given = settings.ports
    ports = [port for port in (given.expert, given.weights, given.client, given.session) if port]
    if len(set(ports)) != len(ports):
        yield Fault("ports", "names one port twice; each plane needs its own")
