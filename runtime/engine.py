"""Running tokens through a range of decoder layers, session by session, and generating text with that.

Decides what a step is: forward one session by some tokens under the routing of the epoch that is current when it
begins. A request's life: 1 `open` reserves its KV cache · 2 `step` with the prompt · 3 the dispatcher asks holders
layer by layer · 4 logits of the last token · 5 `sample` · 6 `step` with that token, and so on · 7 `close` frees the
cache. Several sessions may step at the same time from different threads; one session steps in one thread at a time.
Must not know sockets; where answers come from is the caller's business.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal
from uuid import uuid4

import torch

from runtime.counters import Counters
from runtime.dispatch import Combine, Dispatcher, ExpertCaller, NoCaller
from runtime.errors import ContextFull, InvalidInput, KvBudgetExceeded, UnknownSession
from runtime.loading import Trunk
from runtime.routing import EpochBoard
from runtime.slots import Residency


@dataclass
class _Session:
    """One sequence: its KV cache and how many tokens it has seen."""

    cache: Any
    positions: torch.Tensor  # [1, max_tokens] int64
    max_tokens: int
    kv_bytes: int
    lock: threading.Lock
    seen: int = 0


class Segment:
    """The decoder layers of a `Trunk` with the sessions that run through them. Thread-safe.

    Parameters
    ----------
    kv_budget
        Bytes that the KV caches of all open sessions may take; no limit if None.
    """

    def __init__(
        self,
        trunk: Trunk,
        residency: Residency,
        board: EpochBoard,
        *,
        counters: Counters | None = None,
        kv_budget: int | None = None,
    ) -> None:
        self.trunk = trunk
        self.residency = residency
        self.board = board
        self.counters = counters or Counters(trunk.spec.layers, trunk.spec.experts)
        self.kv_budget = kv_budget
        self._sessions: dict[str, _Session] = {}
        self._kv_used = 0
        self._turn = 0
        self._lock = threading.Lock()
        self._needs_no_mask = _decode_needs_no_mask(trunk.model.config)

    @property
    def kv_used(self) -> int:
        """Bytes reserved by open sessions."""
        return self._kv_used

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def kv_bytes(self, max_tokens: int) -> int:
        """Return what a session of `max_tokens` reserves in these layers."""
        num_layers = self.trunk.last_layer - self.trunk.first_layer + 1
        return self.trunk.spec.kv_bytes_per_token_layer * num_layers * max_tokens

    def open(self, session_id: str, max_tokens: int) -> None:
        """Reserve the KV cache of a session of at most `max_tokens`, prompt included. Modifies.

        Raises
        ------
        ContextFull
            The model cannot attend to so many tokens.
        KvBudgetExceeded
            It does not fit beside the open sessions.
        """
        from transformers import DynamicCache

        if max_tokens > self.trunk.max_context:
            raise ContextFull(wanted=max_tokens, limit=self.trunk.max_context, what="the model's context")
        needed = self.kv_bytes(max_tokens)
        session = _Session(
            cache=DynamicCache(config=self.trunk.model.config),
            positions=torch.arange(max_tokens, device=self.trunk.device)[None],
            max_tokens=max_tokens,
            kv_bytes=needed,
            lock=threading.Lock(),
        )
        with self._lock:
            if session_id in self._sessions:
                raise InvalidInput(f"session {session_id!r} is open already; close it first")
            if self.kv_budget is not None and self._kv_used + needed > self.kv_budget:
                raise KvBudgetExceeded(
                    needed=needed, used=self._kv_used, budget=self.kv_budget, sessions=len(self._sessions)
                )
            self._kv_used += needed
            self._sessions[session_id] = session

    def close(self, session_id: str) -> None:
        """Free a session's KV cache; closing it again changes nothing. Modifies."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
            if session is not None:
                self._kv_used -= session.kv_bytes

    def step(
        self,
        session_id: str,
        inputs: torch.Tensor,
        *,
        caller: ExpertCaller | None = None,
        combine: Combine = "partial",
        keep: Literal["last", "all"] = "last",
    ) -> torch.Tensor:
        """Run the next tokens of a session through the layers. Modifies the session, even if it raises half-way.

        Parameters
        ----------
        inputs
            Token ids [T] int64 where the range starts at layer 0, else hidden states [T, D].
        caller
            The port for experts held elsewhere; used by this thread only, during this call.
        keep
            Whether logits of the last token only, or of all tokens, are computed.

        Returns
        -------
        torch.Tensor
            Logits [1 or T, vocabulary] where the range ends at the last layer, else hidden states [T, D].

        Raises
        ------
        UnknownSession, ContextFull
        CallFailed, ExpertUnavailable
            An expert could not be computed. The session cannot go on: close it.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(session_id)
        with session.lock:
            if session.seen + len(inputs) > session.max_tokens:
                wanted = session.seen + len(inputs)
                raise ContextFull(wanted=wanted, limit=session.max_tokens, what="the session's reservation")
            routing = self.board.begin()
            try:
                dispatcher = Dispatcher(
                    self.residency, routing, caller or NoCaller(), self.counters.fresh(), combine, self._next_turn()
                )
                return self._forward(session, inputs, dispatcher, keep)
            finally:
                self.board.end(routing)

    def _next_turn(self) -> int:
        self._turn += 1  # a lost update between threads only repeats a variant
        return self._turn

    def _forward(
        self, session: _Session, inputs: torch.Tensor, dispatcher: Dispatcher, keep: Literal["last", "all"]
    ) -> torch.Tensor:
        began, count, model = perf_counter(), len(inputs), self.trunk.model
        positions = session.positions[:, session.seen : session.seen + count]
        active = self.trunk.dispatch.set(dispatcher.run)
        try:
            with torch.inference_mode():
                run = self._decode if count == 1 and self._needs_no_mask else self._prefill
                hidden = run(inputs[None], positions, session.cache)  # [1, T, D]
                if self.trunk.has_head:
                    hidden = model.lm_head(hidden[:, -1:] if keep == "last" else hidden)
        finally:
            self.trunk.dispatch.reset(active)
        session.seen += count
        counts = dispatcher.counts
        counts.tokens, counts.steps = count, 1
        counts.trunk_s = perf_counter() - began - dispatcher.spent_s
        self.counters.add(counts)
        return hidden[0]

    def _prefill(self, inputs: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run the model's own forward, masks and all."""
        source = "input_ids" if self.trunk.has_embedding else "inputs_embeds"
        output = self.trunk.model.model(
            **{source: inputs}, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _decode(self, inputs: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run the layers for one token: what the model's forward does where no mask is needed, and no more."""
        inner = self.trunk.model.model
        hidden = inner.embed_tokens(inputs) if self.trunk.has_embedding else inputs
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        for layer in inner.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        normed: torch.Tensor = inner.norm(hidden)
        return normed


def _decode_needs_no_mask(config: Any) -> bool:
    """Whether one token attends to all of its cache through torch's own attention, so that there is nothing to mask."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        full = all(kind == "full_attention" for kind in kinds)
    else:
        full = getattr(config, "sliding_window", None) is None
    return config._attn_implementation == "sdpa" and full


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn among the most likely `top_p` of mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InvalidInput(f"temperature {self.temperature} is outside 0 … 100; 0 is greedy, 1 the model's own")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p {self.top_p} is outside 0 … 1; 1 leaves every token in")


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token from logits [V]. Modifies `generator` unless greedy."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1).cpu()
    ranked, tokens = probabilities.sort(descending=True, stable=True)
    before = ranked.cumsum(0) - ranked  # mass of the more likely ones; the first is always kept
    ranked[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(ranked, 1, generator=generator)])


def generate(
    segment: Segment,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    combine: Combine = "partial",
    caller: ExpertCaller | None = None,
    stop_ids: frozenset[int] | None = None,
    session_id: str | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that follow a prompt, in a session of their own.

    The model's stop token is yielded too and ends it. Closing the iterator frees the session.

    Parameters
    ----------
    stop_ids
        The model's own by default; an empty set never stops early.

    Raises
    ------
    InvalidInput
        An empty prompt, or fewer than one token asked for.
    ContextFull, KvBudgetExceeded
        Prompt and answer do not fit.
    """
    if not prompt_ids or max_tokens < 1:
        raise InvalidInput("a prompt of at least one token and max_tokens of at least 1 are needed")
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = segment.trunk.stop_ids if stop_ids is None else stop_ids
    session_id = session_id or uuid4().hex
    segment.open(session_id, len(prompt_ids) + max_tokens)
    try:
        inputs = torch.tensor(prompt_ids, dtype=torch.int64, device=segment.trunk.device)
        for _ in range(max_tokens):
            logits = segment.step(session_id, inputs, caller=caller, combine=combine)
            token = sample(logits[-1], sampling, generator)
            yield token
            if token in stops:
                return
            inputs = torch.tensor([token], dtype=torch.int64, device=segment.trunk.device)
    finally:
        segment.close(session_id)
