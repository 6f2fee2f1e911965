"""One worker's way from a prompt to tokens: the engine of `runtime` with this node's peers and routes.

Decides what a request may ask for (a prompt, a context within what was planned). Belongs to one thread. Must not know
who reads the tokens.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agent.errors import AgentError, NoActivePlan, RequestCancelled
from agent.peers import PeerCaller
from runtime.engine import Sampling, Segment, generate
from runtime.errors import ContextFull
from runtime.text import TextStream
from schemas.messages import Finished, Generated, GenerateRequest
from schemas.outcome import ExitCode


@dataclass(frozen=True)
class Ingress:
    """What a node needs to take prompts: the trunk in a segment, and the tokenizer."""

    segment: Segment
    tokenizer: Any
    max_tokens: int


class Generator:
    """Makes tokens in one worker thread.

    Parameters
    ----------
    ingress
        Returns what is needed, or None while this node takes no tokens in; then `why_not` says why.
    """

    def __init__(self, caller: PeerCaller, ingress: Callable[[], Ingress | None], why_not: Callable[[], str]) -> None:
        self._caller = caller
        self._ingress = ingress
        self._why_not = why_not

    def generate(self, wanted: GenerateRequest, is_cancelled: Callable[[], bool]) -> Iterator[Generated | Finished]:
        """Yield every token with the text that it completes, then how it ended."""
        ingress = self._ingress()
        if ingress is None:
            raise NoActivePlan(self._why_not())
        prompt = list(ingress.tokenizer(wanted.prompt)["input_ids"])
        self._check(prompt, wanted, ingress)
        self._caller.is_cancelled = is_cancelled
        tokens = generate(
            ingress.segment,
            prompt,
            max_tokens=wanted.max_tokens,
            sampling=Sampling(temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed),
            combine=wanted.combine,
            caller=self._caller,
        )
        try:
            yield from self._stream(wanted, tokens, TextStream(ingress.tokenizer), len(prompt), is_cancelled)
        finally:
            tokens.close()  # type: ignore[attr-defined]  # frees the session
            self._caller.forget_all()

    def _check(self, prompt: list[int], wanted: GenerateRequest, ingress: Ingress) -> None:
        if not prompt:
            raise AgentError("the prompt has no tokens; give it some text", ExitCode.INVALID)
        total = len(prompt) + wanted.max_tokens
        if total > ingress.max_tokens:
            raise ContextFull(wanted=total, limit=ingress.max_tokens, what="the planned context.tokens")

    def _stream(
        self,
        wanted: GenerateRequest,
        tokens: Iterator[int],
        text: TextStream,
        prompt_tokens: int,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[Generated | Finished]:
        began = first = time.monotonic()
        count = 0
        for token in tokens:
            if count == 0:
                first = time.monotonic()
            yield Generated(request=wanted.request, index=count, token=token, text=text.push(token))
            count += 1
            if is_cancelled():
                raise RequestCancelled("the request was cancelled")
        now = time.monotonic()
        yield Finished(
            request=wanted.request,
            reason="length" if count == wanted.max_tokens else "stop",
            prompt_tokens=prompt_tokens,
            tokens=count,
            text=text.end(),
            seconds=now - began,
            prefill_s=first - began,
        )

    def close(self) -> None:
        """Close this thread's connections."""
        self._caller.close()
