"""What each heuristic leaves out, in a line that a comparison prints beside its figures."""

from collections.abc import Mapping
from typing import Final

IGNORES: Final[Mapping[str, str]] = {
    "uniform": "ignores demand, links and compute",
    "popularity": "ignores who asks, links and compute",
    "eplb": "ignores who asks, links and what moving costs",
    "dancemoe": "ignores links, compute and that a layer waits once for all its remote experts",
    "moetuner": "ignores replicas and that a layer waits once for all its remote experts",
    "pipeline": "ignores which experts are asked for, links and compute; whole layers only",
    "pipeline-speed": "ignores which experts are asked for and links; whole layers only",
    "ordermoe": "ignores links and compute; gains by substitution, which 0 % quality rules out",
}
