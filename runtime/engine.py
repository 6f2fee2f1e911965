"""Running tokens through a range of decoder layers, session by session.

Decides what a step is: forward one session by some tokens under the routing of the epoch that is current when it
begins. A request's life: 1 `open` reserves its KV cache · 2 `step` with the prompt · 3 the dispatcher asks holders
layer by layer · 4 logits of the last token · 5 `sample` · 6 `step` with that token, and so on · 7 `close` frees the
cache. Several sessions may step at the same time from different threads, and so may the pieces of one prompt, each a
layer or more behind the one before it (`passage`): the sums are those of one piece after another.
Several sessions' next tokens may also run in one forward (`step_batch`). Must not know sockets; where answers come from
is the caller's business.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch

from runtime.ahead import Foresight, NextRouters
from runtime.caches import Between, session_cache, step_cache
from runtime.counters import Counters
from runtime.cuda.decode import captured_decode
from runtime.cuda.prompts import DevicePrompts, device_prompts
from runtime.dispatch import Combine, Dispatcher, ExpertCaller, NoCaller
from runtime.errors import ContextFull, InvalidInput
from runtime.importance import Importance, RouterTaps, Substitution
from runtime.loading import Trunk
from runtime.passage import Passage, Rest
from runtime.policy.menu import Rates
from runtime.routing import EpochBoard
from runtime.session import OpenSessions, Session
from runtime.slots import Residency

Keep = Literal["last", "all", "none"]
"""Logits of which tokens of a step are computed."""


class Segment:
    """The decoder layers of a `Trunk` with the sessions that run through them. Thread-safe.

    Parameters
    ----------
    kv_budget
        Bytes that the KV caches of all open sessions may take; no limit if None.
    importance
        Lets decode steps use other experts than the router's choice, within a budget; exact if None. Prompts and
        steps that combine in order are exact.
    ahead
        Guesses what the next layer will ask for; by default, that layer's router.
    """

    def __init__(
        self,
        trunk: Trunk,
        residency: Residency,
        board: EpochBoard,
        *,
        counters: Counters | None = None,
        kv_budget: int | None = None,
        importance: Importance | None = None,
        ahead: Foresight | None = None,
    ) -> None:
        self.trunk = trunk
        self.residency = residency
        self.board = board
        self.counters = counters or Counters(trunk.spec.layers, trunk.spec.experts)
        self.importance = importance
        self.captured = captured_decode(trunk, residency)
        self.prompts: DevicePrompts | None = device_prompts(self.captured)
        self._taps = RouterTaps(trunk.model)
        self._ahead: Foresight = ahead or NextRouters(trunk.model)
        self._rates = Rates()
        self.sessions = OpenSessions(kv_budget)
        self._turn = 0

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
        if max_tokens > self.trunk.max_context:
            raise ContextFull(wanted=max_tokens, limit=self.trunk.max_context, what="the model's context")
        session = Session(
            name=session_id,
            cache=session_cache(self.trunk.model.config, max_tokens),
            positions=torch.arange(max_tokens, device=self.trunk.device)[None],
            max_tokens=max_tokens,
            kv_bytes=self.kv_bytes(max_tokens),
        )
        self.sessions.add(session)

    def close(self, session_id: str) -> None:
        """Free a session's KV cache; closing it again changes nothing. Modifies."""
        self.sessions.remove(session_id)

    def step(
        self,
        session_id: str,
        inputs: torch.Tensor,
        *,
        caller: ExpertCaller | None = None,
        combine: Combine = "partial",
        keep: Keep = "last",
        rest: Rest = nullcontext,
    ) -> torch.Tensor:
        """Run the next tokens of a session through the layers. Modifies the session, even if it raises half-way.

        Steps of one session follow in the order in which they ask. One of several tokens may ask while the one before
        it still runs, from another thread: it follows layer by layer, and returns after it.

        Parameters
        ----------
        inputs
            Token ids [T] int64 where the range starts at layer 0, else hidden states [T, D].
        caller
            The port for experts held elsewhere; used by this thread only, during this call.
        keep
            Whether logits of the last token only, of all tokens, or (before the end of a prompt) none are computed.
        rest
            Entered while this step waits for the one before it.

        Returns
        -------
        torch.Tensor
            Logits [1 or T, vocabulary] where the range ends at the last layer, else hidden states [T, D]. With
            ``none``, an empty tensor [0, D] where it ends.

        Raises
        ------
        UnknownSession, ContextFull
        CallFailed, ExpertUnavailable
            An expert could not be computed. The session cannot go on: close it.
        """
        session, mine = self.sessions[session_id], Passage()
        (between,) = self.sessions.begin([session], len(inputs), mine, rest)
        has_failed = True
        try:
            hidden = self._run(session, inputs, between, caller=caller, combine=combine, keep=keep)
            between.before.await_end(rest)
            session.seen += len(inputs)
            has_failed = False
            return hidden[0]
        finally:
            mine.end(failed=has_failed)

    def _run(
        self,
        session: Session,
        inputs: torch.Tensor,
        between: Between,
        *,
        caller: ExpertCaller | None,
        combine: Combine,
        keep: Keep,
    ) -> torch.Tensor:
        """Run a step that was let in: [1, T, D] or logits."""
        is_decode = len(inputs) == 1
        if is_decode:
            between.before.await_end(between.rest)
        is_exact = self.importance is None or not is_decode or combine == "ordered"

        def layers(caches: Sequence[Any]) -> torch.Tensor:
            if is_decode and self.trunk.decoder.needs_no_mask:
                return self._decode(inputs, caches, [between.start])
            if own is not None:
                return own.run(dispatcher, inputs, between.start, caches[0])[None]
            positions = session.positions[:, between.start : between.start + len(inputs)]
            return self._prefill(inputs[None], positions, caches[0])

        dispatcher = self._begin(caller, combine)
        own = None if is_decode or self.captured is None else self.prompts
        own = own if own is not None and own.can_run(dispatcher) else None
        try:
            if not is_exact:
                return self._within(dispatcher, layers, [session])
            if own is not None:  # one device computes no pieces side by side
                between.before.await_end(between.rest)
            cache = session.cache if is_decode or own is not None else step_cache(session.cache, between)
            return self._forward(dispatcher, lambda: layers([cache]), keep)
        finally:
            self.board.end(dispatcher.routing)

    def go_on(self, session_id: str, token: int, most: int) -> list[int]:
        """Run the next token of a session, and behind it the best one each time. Modifies the session.

        A CUDA device takes its own choice without anybody having read it; steps are as `step`'s, combined as partial
        sums, but that the host needs no time between them.

        Parameters
        ----------
        most
            Tokens to run at most; there are fewer where they take long.

        Returns
        -------
        list of int
            The best token behind each that was run; none, and nothing is run, where `step` must run them one by one.

        Raises
        ------
        UnknownSession, ContextFull
        ExpertUnavailable
            The session cannot go on: close it.
        """
        session, mine, captured = self.sessions[session_id], Passage(), self.captured
        is_whole = self.trunk.has_embedding and self.trunk.has_head
        if captured is None or self.importance is not None or not is_whole:
            return []
        dispatcher = self._begin(None, "partial")
        try:
            if not captured.can_run(dispatcher, [session.cache]):
                return []
            count = captured.at_once(most)
            (between,) = self.sessions.begin([session], count, mine, nullcontext)
            has_failed = True
            try:
                between.before.await_end(nullcontext)
                inputs = torch.tensor([token], dtype=torch.int64, device=self.trunk.device)
                run = partial(captured.run_on, dispatcher, inputs, session.cache, between.start, count)
                best: list[int] = self._forward(dispatcher, lambda: run()[None], "best")[0].tolist()
                session.seen += count
                has_failed = False
                return best
            finally:
                mine.end(failed=has_failed)
        finally:
            self.board.end(dispatcher.routing)

    def step_batch(
        self, session_ids: Sequence[str], inputs: torch.Tensor, *, caller: ExpertCaller | None = None
    ) -> torch.Tensor:
        """Run the next token of each of several sessions in one forward, partial sums combined. Modifies them all.

        An expert that several of them need is computed once for all, and each holder is called once in a layer.
        Results are those of single steps but for rounding.

        Parameters
        ----------
        session_ids
            B sessions, each once, of any lengths, all past their prompt.
        inputs
            Token ids [B] int64 where the range starts at layer 0, else hidden states [B, D].

        Returns
        -------
        torch.Tensor
            Logits [B, vocabulary] where the range ends at the last layer, else hidden states [B, D].

        Raises
        ------
        UnknownSession, ContextFull, InvalidInput
            Before anything is modified.
        CallFailed, ExpertUnavailable
            An expert could not be computed. None of the sessions can go on: close them.
        """
        if len(set(session_ids)) != len(session_ids) or len(session_ids) != len(inputs) or not session_ids:
            raise InvalidInput("a batch needs one input for each of its sessions, and each session once")
        sessions = [self.sessions[name] for name in session_ids]
        mine, has_failed = Passage(), True
        steps = self.sessions.begin(sessions, 1, mine, nullcontext)
        try:
            for step in steps:
                step.before.await_end(nullcontext)
            hidden = self._run_batch(sessions, inputs, caller)
            for session in sessions:
                session.seen += 1
            has_failed = False
            return hidden[:, 0]
        finally:
            mine.end(failed=has_failed)

    def _run_batch(
        self, sessions: Sequence[Session], inputs: torch.Tensor, caller: ExpertCaller | None
    ) -> torch.Tensor:
        dispatcher = self._begin(caller, "partial")
        try:
            seen = [session.seen for session in sessions]
            return self._within(dispatcher, lambda caches: self._decode(inputs, caches, seen), sessions)
        finally:
            self.board.end(dispatcher.routing)

    def _begin(self, caller: ExpertCaller | None, combine: Combine) -> Dispatcher:
        """Begin a step under the current routing; whoever called ends it on the board."""
        routing = self.board.begin()
        self._turn += 1  # a lost update between threads only repeats a variant
        counts, port = self.counters.fresh(), caller or NoCaller()
        dispatcher = Dispatcher(self.residency, routing, port, counts, combine, self._turn)
        dispatcher.ahead, dispatcher.rates = self._ahead, self._rates
        return dispatcher

    def _within(
        self, dispatcher: Dispatcher, layers: Callable[[list[Any]], torch.Tensor], sessions: Sequence[Session]
    ) -> torch.Tensor:
        """Run one token of each session, exactly or as far as the quality budget allows; `layers` takes caches."""
        caches = [session.cache for session in sessions]

        def forward(substitution: Substitution | None, is_trial: bool) -> torch.Tensor:
            if substitution is None:
                return self._forward(dispatcher, lambda: layers(caches), "all")
            used = copy.deepcopy(caches) if is_trial else caches
            other = replace(dispatcher, substitution=substitution, counts=self.counters.fresh())
            with self._taps.open(substitution.see):
                return self._forward(other, lambda: layers(used), "all", is_counted=not is_trial)

        if self.importance is None:
            return forward(None, False)
        return self.importance.run(self._taps, forward, tokens=len(sessions), can_sample=self.trunk.has_head)

    def _forward(
        self,
        dispatcher: Dispatcher,
        layers: Callable[[], torch.Tensor],
        keep: Keep | Literal["best"],
        *,
        is_counted: bool = True,
    ) -> torch.Tensor:
        """Run `layers`, which returns [B, T, D], and the head where the range has it; count the step.

        With ``best`` it returns the tokens [1, T] that came behind T, each of which was a step.
        """
        began, counts = perf_counter(), dispatcher.counts
        active = self.trunk.dispatch.set(dispatcher.run)
        try:
            with torch.inference_mode():
                hidden = layers()
                counts.tokens = hidden.shape[0] * hidden.shape[1]
                counts.steps = counts.tokens if keep == "best" else 1
                if self.trunk.has_head and keep != "best":
                    hidden = self._head(hidden, keep, dispatcher.logits)
        finally:
            self.trunk.dispatch.reset(active)
        now = perf_counter()
        counts.trunk_s = now - began - dispatcher.spent_s
        if dispatcher.timeline is not None:
            about = {
                "trunk_ms": 1e3 * counts.trunk_s,
                "experts_ms": 1e3 * counts.local_s,
                "wait_ms": 1e3 * counts.wait_s,
            }
            dispatcher.timeline.add("steps", f"{counts.tokens} tokens", began, now, **about, **counts.tier_rows)
        if dispatcher.substitution is not None:
            dispatcher.substitution.count(counts)
        if is_counted:
            self.counters.add(counts)
        return hidden

    def _head(self, hidden: torch.Tensor, keep: Keep, made: torch.Tensor | None) -> torch.Tensor:
        if keep == "none":
            return hidden[:, :0]
        if made is not None:
            return made[:, None]
        logits: torch.Tensor = self.trunk.model.lm_head(hidden[:, -1:] if keep == "last" else hidden)
        return logits

    def _prefill(self, inputs: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run the model's own forward, masks and all."""
        source = "input_ids" if self.trunk.has_embedding else "inputs_embeds"
        output = self.trunk.model.model(
            **{source: inputs}, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _decode(self, inputs: torch.Tensor, caches: Sequence[Any], seen: Sequence[int]) -> torch.Tensor:
        """Run one token of each of B sessions: [B, 1, D]."""
        decoder, dispatch = self.trunk.decoder, self.trunk.dispatch.get()
        step = getattr(dispatch, "__self__", None)
        if self.captured is not None and isinstance(step, Dispatcher) and self.captured.can_run(step, caches):
            answer = self.captured.run(step, inputs, caches, seen)
            step.logits = answer.logits
            return answer.hidden[:, None]
        return decoder.run(inputs, caches, seen, dispatch, self._taps.seeing)[:, None]
