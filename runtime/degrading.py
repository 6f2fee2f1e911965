"""What low precision costs: negative log-likelihood of text with experts rounded, all of them and layer by layer.

Decides nothing: it rounds the experts of a loaded model (`runtime.rounding`) and runs the text (`runtime.forcing`) with
the router's own choice.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from runtime.calibrate import Rise, require_pieces
from runtime.forcing import Bench, Run, Supply
from runtime.policy.routing import Exact
from runtime.precision import UnfitPrecision
from runtime.rounding import degraded
from schemas.calibration import PrecisionCost
from schemas.precision import LowPrecision

log = logging.getLogger(__name__)

_PROBE_PIECES: Final = 12
_CONFIDENT: Final = 1.96  # standard errors on either side: 95 %


def precision_costs(
    bench: Bench, precisions: Sequence[LowPrecision], *, progress: Callable[[int, int], None] | None = None
) -> list[PrecisionCost]:
    """Return what each precision costs that fits the model; what is at hand does not matter.

    Raises
    ------
    InvalidInput
        The text is too short.
    """
    layers, experts = bench.supply.layers, bench.supply.experts
    require_pieces(bench.pieces)
    everything = Supply(layers, experts, masks=np.ones((layers, experts), dtype=bool))
    done, total = 0, 1 + len(precisions) * (1 + layers)

    def report() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    plain = Bench(bench.model, bench.pieces, everything, bench.top_k, on_run=report)
    exact = plain.run(Exact(), keep=True)
    costs = []
    for precision in precisions:
        try:
            costs.append(_cost(plain, exact, precision))
        except UnfitPrecision as error:
            log.warning("%s; what it costs is not measured", error)
    return costs


def _cost(bench: Bench, exact: Run, precision: LowPrecision) -> PrecisionCost:
    layers = range(bench.supply.layers)
    stride = max(1, len(bench.pieces) // _PROBE_PIECES)

    def run(only: Sequence[int] | None, stride: int) -> Run:
        with degraded(bench.model, precision, only):
            return bench.run(Exact(), stride=stride)

    whole = run(None, 1)
    alone = np.array([max(run([layer], stride).divergence, 1e-12) for layer in layers])
    rise = Rise.between(exact, whole)
    interval = _CONFIDENT * rise.error
    nll = alone / alone.sum() * max(rise.mean + interval, 0.0) / bench.top_k
    return PrecisionCost(
        precision=precision,
        rise=math.expm1(rise.mean),
        low=math.expm1(rise.mean - interval),
        high=math.expm1(rise.mean + interval),
        divergence=max(whole.divergence, 0.0),
        nll_per_row=tuple(nll.tolist()),
    )
