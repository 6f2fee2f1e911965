"""When tokens arrive: requests of consecutive recorded tokens at every ingress.

Decides how a token rate becomes requests. A token of a request starts when the one before it has ended, as decoding
does; requests arrive on their own. So `requests` (the default) is what a serving cluster sees; `tokens` makes every
token a request of its own, which is the open queue of textbooks and what expected utilisation assumes; `closed` keeps
a number of sessions per ingress busy all the time, which is how a benchmark of real agents drives them. Requests have
the prompts that the topology tells of, but for `tokens`, which stand for answers under way. Must not know placements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from planner.problem import Floats, Ints

Pattern = Literal["requests", "tokens", "closed"]
Spacing = Literal["poisson", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """How tokens arrive.

    Attributes
    ----------
    tokens
        Simulated over all ingresses, shared out in proportion to their rates.
    request_tokens
        Consecutive tokens of one request.
    sessions
        Of each ingress, for the `closed` pattern.
    """

    tokens: int = 20_000
    pattern: Pattern = "requests"
    spacing: Spacing = "poisson"
    rate_scale: float = 1.0
    request_tokens: int = 32
    sessions: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests by time of arrival.

    Attributes
    ----------
    arrival_s
        float64 ``[R]``, ascending; infinite where the request starts when another ends.
    ingress, first_token, num_tokens
        Which trace, and which of its tokens (counted on past its end: it is replayed in a ring), int64 ``[R]``.
    following
        Request that starts when this one ends, int64 ``[R]``; -1 for none.
    prompts
        Whether requests begin with a prompt, where their ingress has one.
    """

    arrival_s: Floats
    ingress: Ints
    first_token: Ints
    num_tokens: Ints
    following: Ints
    prompts: bool = True


_COLUMNS: Final = ("arrival_s", "ingress", "first_token", "num_tokens", "following")


def tokens_by_ingress(tokens_per_s: Floats, tokens: int) -> Ints:
    """Share tokens out by rate, at least one where the rate is not zero, int64 ``[I]``."""
    if not np.isfinite(tokens_per_s).all() or tokens_per_s.sum() <= 0:
        raise ValueError("no ingress has a token rate above 0, so there is nothing to simulate")
    exact = tokens * tokens_per_s / tokens_per_s.sum()
    return np.where(tokens_per_s > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int64)


def draw_requests(tokens_per_s: Floats, trace_tokens: Sequence[int], arrivals: Arrivals) -> Requests:
    """Draw requests at all ingresses. The same seed at a higher rate gives the same requests closer together."""
    counts = tokens_by_ingress(tokens_per_s, arrivals.tokens)
    generators = np.random.default_rng(arrivals.seed).spawn(len(counts))
    parts, before = [], 0
    for ingress in np.flatnonzero(counts).tolist():
        rate = float(tokens_per_s[ingress]) * arrivals.rate_scale
        part = _at_ingress(
            ingress,
            count=int(counts[ingress]),
            rate=rate,
            trace_tokens=trace_tokens[ingress],
            arrivals=arrivals,
            rng=generators[ingress],
        )
        part.following[part.following >= 0] += before
        before += len(part.arrival_s)
        parts.append(part)
    arrival_s, number, first, length, following = (
        np.concatenate([getattr(part, field) for part in parts]) for field in _COLUMNS
    )
    order = np.argsort(arrival_s, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    following = np.where(following >= 0, rank[following], -1)[order]
    prompts = arrivals.pattern != "tokens"
    return Requests(arrival_s[order], number[order], first[order], length[order], following, prompts)


def _at_ingress(
    ingress: int, *, count: int, rate: float, trace_tokens: int, arrivals: Arrivals, rng: np.random.Generator
) -> Requests:
    """Draw the requests of one ingress; `following` counts among them."""
    size = 1 if arrivals.pattern == "tokens" else min(arrivals.request_tokens, count)
    lengths = np.full(-(-count // size), size)
    lengths[-1] -= lengths.sum() - count
    number = np.arange(len(lengths))
    following = np.full(len(lengths), -1)
    if arrivals.pattern == "closed":
        arrival = np.where(number < arrivals.sessions, 0.0, np.inf)
        following = np.where(number + arrivals.sessions < len(number), number + arrivals.sessions, -1)
    else:
        gaps = rng.exponential(size=len(lengths)) if arrivals.spacing == "poisson" else np.ones(len(lengths))
        gaps[0] *= rng.random()  # so that ingresses do not all start at once
        arrival = np.cumsum(gaps * size / rate)
    return Requests(
        arrival_s=arrival,
        ingress=np.full(len(lengths), ingress),
        first_token=(np.cumsum(lengths) - lengths + rng.integers(trace_tokens)) % trace_tokens,
        num_tokens=lengths,
        following=following,
    )
