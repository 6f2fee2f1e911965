"""Reads everything a topology names: the model's shape, the traces of its workloads, counters of a running cluster.

Decides what this version can plan and that all files belong together. Flow: topology.yaml → `Inputs` → `Problem`.
Must not know how the problem is solved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from planner.demand import Trace, activation_share, counted_share, counter_faults, read_trace
from planner.errors import UnfitPrecision
from planner.precision import PrecisionCosts, read_costs
from planner.problem import Events, Problem, build_problem
from schemas.activation import ActivationCounts
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from schemas.files import Fault, InvalidFile, load_json, load_yaml
from schemas.model import ModelSpec
from schemas.plan import NodePrecision, Plan
from schemas.precision import INT4_GROUP, Precision
from schemas.sizes import ExpertSizes, sizes_of_checkpoint, sizes_of_spec
from schemas.topology import Topology, load_topology

CALIBRATION_NAME: Final = "calibration.json"  # in the model's directory, where agents look too


@dataclass(frozen=True, eq=False)
class Inputs:
    """A topology with everything it names read.

    Attributes
    ----------
    model
        As held in the topology's dtype.
    traces
        By workload, only those that enter somewhere.
    counters
        What a running cluster counted, where given.
    sizes
        Bytes of one expert by precision, in the topology's dtype otherwise; as the spec's counts have it where None.
    costs
        What precisions cost, as a calibration measured it; None where there is none.
    """

    topology: Topology
    model: ModelSpec
    traces: Mapping[str, Trace]
    counters: ActivationCounts | None = None
    sizes: ExpertSizes | None = None
    costs: PrecisionCosts | None = None

    def problem(self, traces: Mapping[str, Trace] | None = None) -> Problem:
        """Build the problem, from other traces of the same workloads where given."""
        chosen = self.events(self.traces if traces is None else traces)
        shares = [activation_share(events, self.model.experts) for events in chosen]
        if self.counters is not None:
            counted = {node.node: counted_share(node) for node in self.counters.nodes if node.tokens > 0}
            ingress = [node.id for node in self.topology.nodes if node.ingress]
            shares = [counted.get(node, share) for node, share in zip(ingress, shares, strict=True)]
        return build_problem(self.topology, self.model, chosen, shares, self.sizes)

    def with_trunk_mode(self, mode: Literal["stay", "move"]) -> "Inputs":
        """Return the inputs with the trunk at the ingress, or where the planner decides, whatever the topology says."""
        topology = self.topology.model_copy(update={"trunk": self.topology.trunk.model_copy(update={"mode": mode})})
        return replace(self, topology=topology)

    def with_precisions(self, precisions: Mapping[str, Precision]) -> "Inputs":
        """Return the inputs with nodes that hold experts in other precisions than the topology says.

        Raises
        ------
        UnfitPrecision
            One of them does not fit the model.
        """
        sizes = sizes_of_spec(self.model) if self.sizes is None else self.sizes
        for precision in precisions.values():
            if precision not in sizes:
                raise UnfitPrecision(_unfit(precision, sizes))
        nodes = tuple(
            node.model_copy(update={"precision": precisions.get(node.id, node.precision)})
            for node in self.topology.nodes
        )
        return replace(self, topology=self.topology.model_copy(update={"nodes": nodes}))

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In which each node holds experts, as far as that is said, else the checkpoint's."""
        return tuple(node.precision or "checkpoint" for node in self.topology.nodes)

    def with_unsaid(self, precision: Precision) -> "Inputs":
        """Return the inputs with a precision for nodes of which the topology does not say it."""
        return self.with_precisions({n.id: precision for n in self.topology.nodes if n.precision is None})

    def with_quality_budget(self, budget: float) -> "Inputs":
        """Return the inputs with another budget than the topology's."""
        quality = self.topology.quality.model_copy(update={"budget": budget})
        return replace(self, topology=self.topology.model_copy(update={"quality": quality}))

    def as_planned(self, plan: Plan) -> "Inputs":
        """Return the inputs with nodes in the precisions that a plan was made for."""
        return self.with_precisions({each.node: each.precision for each in self._precisions_of(plan)})

    def keeping(self, plan: Plan) -> "Inputs":
        """Return the inputs with nodes in the precisions of a plan in force, where the topology says none."""
        said = {node.id for node in self.topology.nodes if node.precision is not None}
        return self.with_precisions({p.node: p.precision for p in self._precisions_of(plan) if p.node not in said})

    def _precisions_of(self, plan: Plan) -> tuple[NodePrecision, ...]:
        """Return what a plan says of precisions: nothing if it is of another model, as whoever uses it is told then."""
        return plan.precisions or () if plan.model == self.model else ()

    def entering(self) -> list[Trace]:
        """Trace of each ingress, in the order of nodes."""
        return [self.traces[node.ingress.workload] for node in self.topology.nodes if node.ingress]

    def events(self, traces: Mapping[str, Trace]) -> tuple[Events, ...]:
        """Chosen experts ``[T, L, K]`` of each ingress, in the order of nodes."""
        return tuple(traces[node.ingress.workload].chosen for node in self.topology.nodes if node.ingress)


def load_inputs(path: Path, counters: Path | None = None, calibration: Path | None = None) -> Inputs:
    """Read a topology file and all it names; `calibration` takes the place of the one that it names.

    Raises
    ------
    InvalidFile, InvalidCheckpoint
        Naming what is wrong in which file.
    """
    topology = load_topology(path)
    model = load_model(path, topology)
    sizes = load_sizes(path, topology, model)
    faults = [
        *_pin_faults(topology, model),
        *_rate_faults(topology),
        *_context_faults(path, topology),
        *_precision_faults(topology, sizes),
    ]
    if faults:
        raise InvalidFile(path, faults)
    workloads = dict.fromkeys(node.ingress.workload for node in topology.nodes if node.ingress)
    traces = {name: read_trace(path.parent / topology.workloads[name], model) for name in workloads}
    counted = _load_counters(counters, topology, model) if counters else None
    return Inputs(topology, model, traces, counted, sizes, _load_costs(path, topology, model, calibration))


def load_model(path: Path, topology: Topology) -> ModelSpec:
    """Read the model a topology names, a checkpoint directory or a model spec file, as held in its dtype."""
    target = path.parent / topology.model
    if target.is_dir():
        return read_checkpoint(target).model_spec.held_as(topology.dtype)
    if not target.is_file():
        fault = Fault("model", f"{target} is neither a checkpoint directory nor a model spec file")
        raise InvalidFile(path, [fault])
    if target.suffix not in {".yaml", ".yml", ".json"}:
        raise InvalidCheckpoint(f"{target}: neither a checkpoint directory nor a model spec (.yaml)")
    return load_yaml(target, ModelSpec).held_as(topology.dtype)


def load_sizes(path: Path, topology: Topology, model: ModelSpec) -> ExpertSizes:
    """Return what an expert of the topology's model takes in each precision that fits it."""
    target = path.parent / topology.model
    return sizes_of_checkpoint(read_checkpoint(target), topology.dtype) if target.is_dir() else sizes_of_spec(model)


def _load_costs(path: Path, topology: Topology, model: ModelSpec, calibration: Path | None) -> PrecisionCosts | None:
    """Read what precisions cost: from the file that was given, or named, or else lies with the model."""
    named = topology.quality.calibration
    file = calibration or (path.parent / named if named else path.parent / topology.model / CALIBRATION_NAME)
    if named and not calibration and not file.is_file():
        raise InvalidFile(path, [Fault("quality.calibration", f"there is no file {file}; make it by agent calibrate")])
    return read_costs(file, model) if calibration or file.is_file() else None


def _precision_faults(topology: Topology, sizes: ExpertSizes) -> Iterator[Fault]:
    for index, node in enumerate(topology.nodes):
        if node.precision is not None and node.precision not in sizes:
            yield Fault(f"nodes[{index}].precision", _unfit(node.precision, sizes))


def _unfit(precision: Precision, sizes: ExpertSizes) -> str:
    fitting = ", ".join(sizes)
    if len(sizes) == 1:
        return (
            f"{precision} does not fit this model, as far as the bytes of an expert tell, which are not those of three "
            f"matrices; name the checkpoint's directory as model, or leave precision {fitting}"
        )
    return (
        f"{precision} does not fit this model, whose matrices do not fall into groups of {INT4_GROUP} weights; it may "
        f"be one of {fitting}"
    )


def _load_counters(path: Path, topology: Topology, model: ModelSpec) -> ActivationCounts:
    nodes = {node.id for node in topology.nodes}
    return load_json(
        path,
        ActivationCounts,
        lambda counters: counter_faults(counters, model, cluster=topology.cluster, nodes=nodes),
    )


def _pin_faults(topology: Topology, model: ModelSpec) -> Iterator[Fault]:
    for index, pin in enumerate(topology.pins):
        if pin.layer >= model.layers or pin.expert >= model.experts:
            yield Fault(
                f"pins[{index}]",
                f"layer {pin.layer} expert {pin.expert} is not in {model.id}: layers with experts are 0 … "
                f"{model.layers - 1}, experts 0 … {model.experts - 1}",
            )


def _context_faults(path: Path, topology: Topology) -> Iterator[Fault]:
    """Refuse a context longer than the model's own, where it is a checkpoint that says how long that is."""
    target, tokens = path.parent / topology.model, topology.context.tokens
    most = read_checkpoint(target).max_context if target.is_dir() else None
    if most is not None and tokens > most:
        yield Fault(
            "context.tokens",
            f"{tokens} tokens are above the {most} that {topology.model} has positions for; plan for {most} at most",
        )


def _rate_faults(topology: Topology) -> Iterator[Fault]:
    if not any(node.ingress and node.ingress.tokens_per_s > 0 for node in topology.nodes):
        yield Fault("nodes", "tokens_per_s is 0 at every ingress, so there is nothing to place for; raise one")
