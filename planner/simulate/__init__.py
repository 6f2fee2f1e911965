"""Discrete-event replay of recorded routing against a placement: what tokens would meet, before anything is moved."""

from planner.simulate.arrivals import Arrivals
from planner.simulate.network import Network, build_network
from planner.simulate.outcome import Latency, Simulation, simulate

__all__ = ["Arrivals", "Latency", "Network", "Simulation", "build_network", "simulate"]
