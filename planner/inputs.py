"""Reads everything a topology names: the model's shape, the traces of its workloads, counters of a running cluster.

Decides what this version can plan and that all files belong together. Flow: topology.yaml → `Inputs` → `Problem`.
Must not know how the problem is solved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from planner.demand import Trace, activation_share, counted_share, counter_faults, read_trace
from planner.problem import Events, Problem, build_problem
from schemas.activation import ActivationCounts
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from schemas.files import Fault, InvalidFile, load_json, load_yaml
from schemas.model import ModelSpec
from schemas.topology import Topology, load_topology


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
    """

    topology: Topology
    model: ModelSpec
    traces: Mapping[str, Trace]
    counters: ActivationCounts | None = None

    def problem(self, traces: Mapping[str, Trace] | None = None) -> Problem:
        """Build the problem, from other traces of the same workloads where given."""
        chosen = self.events(self.traces if traces is None else traces)
        shares = [activation_share(events, self.model.experts) for events in chosen]
        if self.counters is not None:
            counted = {node.node: counted_share(node) for node in self.counters.nodes if node.tokens > 0}
            ingress = [node.id for node in self.topology.nodes if node.ingress]
            shares = [counted.get(node, share) for node, share in zip(ingress, shares, strict=True)]
        return build_problem(self.topology, self.model, chosen, shares)

    def with_trunk_mode(self, mode: Literal["stay", "move"]) -> "Inputs":
        """Return the inputs with the trunk at the ingress, or where the planner decides, whatever the topology says."""
        topology = self.topology.model_copy(update={"trunk": self.topology.trunk.model_copy(update={"mode": mode})})
        return replace(self, topology=topology)

    def entering(self) -> list[Trace]:
        """Trace of each ingress, in the order of nodes."""
        return [self.traces[node.ingress.workload] for node in self.topology.nodes if node.ingress]

    def events(self, traces: Mapping[str, Trace]) -> tuple[Events, ...]:
        """Chosen experts ``[T, L, K]`` of each ingress, in the order of nodes."""
        return tuple(traces[node.ingress.workload].chosen for node in self.topology.nodes if node.ingress)


def load_inputs(path: Path, counters: Path | None = None) -> Inputs:
    """Read a topology file and all it names.

    Raises
    ------
    InvalidFile, InvalidCheckpoint
        Naming what is wrong in which file.
    """
    topology = load_topology(path)
    model = load_model(path, topology)
    if faults := [*_pin_faults(topology, model), *_rate_faults(topology), *_context_faults(path, topology)]:
        raise InvalidFile(path, faults)
    workloads = dict.fromkeys(node.ingress.workload for node in topology.nodes if node.ingress)
    traces = {name: read_trace(path.parent / topology.workloads[name], model) for name in workloads}
    return Inputs(topology, model, traces, _load_counters(counters, topology, model) if counters else None)


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
