"""The engine of remote models: any server that speaks OpenAI's chat completions.

What differs from an engine in this process: the server tokenises, so a prompt is a chat (`dialect.ChatBytes`) and the
tokens of an answer are counted but not known; and the server draws, so a sampled answer can be made again only where it
honours the request's seed. Its completions serve evaluation; training refuses this engine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.engines.base import Settled, check_lengths
from msgrpo_lab.engines.remote.dialect import (
    OWN_FIELDS,
    Chat,
    ChatBytes,
    Constraint,
    RequestWriter,
    Server,
    legal_words,
    read_chat,
)
from msgrpo_lab.engines.remote.transport import Answer, Backoff, ChatTransport, RemoteModelError, Usage, excerpt
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder, PromptTemplate
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling

LogprobsOf = Literal["model", "sampling"]

UNKNOWN_TOKEN = -1
"""Stands for each token of an answer: how many there were is known, which is not."""
MEMORY = 100_000
"""Greedy answers remembered at most."""
LARGEST_SEED = 2**31 - 1
"""Every kind of server takes a seed up to here."""


class OpenAIEngine:
    """Completes prompts by asking a server.

    Each distinct prompt under greedy decoding is asked once until the next `sync`. An answer that the server still
    owes after all retries ends the call with `RemoteModelError`, in one line.

    Args:
        base_url: address of the API; usually ends in /v1.
        model: the name by which the server knows the model; None until `for_model` names one.
        server: the kind of server, which decides how a decoding rule is written (`dialect.py`).
        api_key_env: environment variable that holds the key; None, or one that is not set, sends none.
        concurrency: requests under way at a time, at most.
        request_timeout_s: seconds one attempt may take.
        total_timeout_s: seconds one prompt may take with all its attempts.
        retries: times a prompt is asked again after a fault that may pass.
        first_wait_s: wait before the first retry; it doubles with each.
        longest_wait_s: the wait does not grow beyond; a server's Retry-After may.
        logprobs: what the log-probabilities that the server reports are of: the model, or the distribution sampled
            from; None does not ask for any.
        constrain_by: the server's way to keep an answer to the legal words; None refuses constrained decoding.
        extra_body: further fields of every request, for what only this server knows.
    """

    samples_policy = False

    def __init__(
        self,
        *,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        server: Server = "vllm",
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 16,
        request_timeout_s: float = 120.0,
        total_timeout_s: float = 900.0,
        retries: int = 6,
        first_wait_s: float = 0.5,
        longest_wait_s: float = 30.0,
        logprobs: LogprobsOf | None = None,
        constrain_by: Constraint | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        _check_options(server=server, logprobs=logprobs, constrain_by=constrain_by)
        _check_at_least(1, concurrency=concurrency)
        _check_at_least(0, retries=retries)
        _check_seconds(
            request_timeout_s=request_timeout_s,
            total_timeout_s=total_timeout_s,
            first_wait_s=first_wait_s,
            longest_wait_s=longest_wait_s,
        )
        if taken := OWN_FIELDS & set(extra_body or {}):
            raise ValueError(f"extra_body={sorted(taken)}: set by the lab itself; use its own keys for these")
        self.model = model
        self._writer = RequestWriter(
            server=server, constrain_by=constrain_by, logprobs=logprobs is not None, extra_body=extra_body or {}
        )
        self._logprobs_of = logprobs
        self._transport = ChatTransport(
            base_url=base_url,
            server=server,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout_s=request_timeout_s,
            total_timeout_s=total_timeout_s,
            backoff=Backoff(retries=retries, first_s=first_wait_s, longest_s=longest_wait_s),
        )
        self._version = 0
        self._seconds = 0.0
        self._greedy: dict[tuple[bytes, Sampling], Answer] = {}

    def prompt(self, template: PromptTemplate) -> PromptBuilder:
        """A builder of prompts that this engine reads."""
        return PromptBuilder(template, ChatBytes())

    def check_rule(self, sampling: Sampling, opening: str = "") -> None:
        """Raises `ValueError` if this server cannot do what a decoding rule or a prompt's opening asks for."""
        if self.model is None:
            raise ValueError("model=null: a server is asked for a model by name; give model=…")
        self._writer.body(self.model, Chat((), opening), sampling, None)

    def sync(self, policy: LanguagePolicy | None = None, version: int = 0) -> None:  # noqa: ARG002
        """The model is what the server has; remembered answers and the counts of `metrics` begin anew."""
        self._version, self._seconds = version, 0.0
        self._transport.usage = Usage()
        self._greedy.clear()

    def observe(self, games: Sequence[TextGame]) -> None:
        """A language model reads its prompt and nothing else."""

    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,  # noqa: ARG002
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. Each sampled answer moves its generator by one number, the request's seed.

        Raises:
            RemoteModelError: the server could not be asked.
            ValueError: it cannot do what is asked for.
        """
        check_lengths(prompts, rngs)
        started = time.perf_counter()
        answers = self._greedily(prompts, sampling) if sampling.greedy else self._drawn(prompts, sampling, rngs)
        self._seconds += time.perf_counter() - started
        return [self._completion(prompt, answer, sampling) for prompt, answer in zip(prompts, answers, strict=True)]

    def _greedily(self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling) -> list[Answer]:
        keys = [(prompt.tobytes(), sampling) for prompt in prompts]
        if len(self._greedy) + len(keys) > MEMORY:
            self._greedy.clear()
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._greedy}
        bodies = [self._body(prompt, sampling, None) for prompt in missing.values()]
        self._greedy.update(zip(missing, self._transport.ask(bodies), strict=True))
        return [self._greedy[key] for key in keys]

    def _drawn(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, rngs: Sequence[np.random.Generator]
    ) -> list[Answer]:
        seeds = [int(rng.integers(LARGEST_SEED, endpoint=True)) for rng in rngs]
        return self._transport.ask(
            [self._body(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        )

    def _body(self, prompt: Int[np.ndarray, " P"], sampling: Sampling, seed: int | None) -> dict[str, Any]:
        if self.model is None:
            raise ValueError("model=null: a server is asked for a model by name; give model=…")
        return self._writer.body(self.model, read_chat(prompt), sampling, seed)

    def _completion(self, prompt: Int[np.ndarray, " P"], answer: Answer, sampling: Sampling) -> Completion:
        text, cut = _cut_after_stop(answer.text, sampling.stop)
        if sampling.choices is not None and text not in legal_words(sampling):
            raise RemoteModelError(
                f"constrain_by={self._writer.constrain_by}: the server answered {excerpt(text)!r}, which is no "
                "legal word; it does not know this option, so try another, or rollout.sampling.constrain=false"
            )
        logprobs = self._logprobs(answer, sampling)
        return Completion(
            prompt_ids=prompt,
            token_ids=np.full(len(logprobs), UNKNOWN_TOKEN, dtype=np.int64),
            logprobs=logprobs,
            text=text,
            finish_reason="length" if answer.finish_reason == "length" and not cut else "stop",
            policy_version=self._version,
        )

    def _logprobs(self, answer: Answer, sampling: Sampling) -> Float[np.ndarray, " C"]:
        """What the server reports, where that is of the distribution sampled from; otherwise NaN, one a token."""
        plain = sampling.temperature == 1.0 and sampling.top_k is None and sampling.top_p is None
        of_the_rule = {"model": plain and sampling.choices is None, "sampling": not sampling.greedy}
        if answer.logprobs is not None and self._logprobs_of is not None and of_the_rule[self._logprobs_of]:
            return np.array(answer.logprobs, dtype=np.float32)
        count = answer.completion_tokens
        if count is None:
            count = len(answer.logprobs or ())
        return np.full(count, np.nan, dtype=np.float32)

    def metrics(self) -> Mapping[str, float]:
        """See `RolloutEngine.metrics`. Token counts are the server's.

        `remote_uncounted` answers came without a count; their completions hold no tokens.
        """
        usage = self._transport.usage
        return {
            "remote_requests": float(usage.requests),
            "remote_retries": float(usage.retries),
            "remote_prompt_tokens": float(usage.prompt_tokens),
            "remote_completion_tokens": float(usage.completion_tokens),
            "remote_uncounted": float(usage.uncounted),
            "remote_s": self._seconds,
        }

    def close(self) -> None:
        """Forgets the remembered answers; no connection outlives a call of `generate`."""
        self._greedy.clear()


OPTIONS: Mapping[str, tuple[str | None, ...]] = {
    "server": get_args(Server),
    "logprobs": (None, *get_args(LogprobsOf)),
    "constrain_by": (None, *get_args(Constraint)),
}


def _check_options(**chosen: str | None) -> None:
    for key, value in chosen.items():
        if value not in OPTIONS[key]:
            listed = ", ".join(option or "null" for option in OPTIONS[key])
            raise ValueError(f"{key}={value}: must be one of: {listed}")


def _check_at_least(least: int, **numbers: int) -> None:
    for key, value in numbers.items():
        if value < least:
            raise ValueError(f"{key}={value}: must be at least {least}")


def _check_seconds(**seconds: float) -> None:
    for key, value in seconds.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{key}={value}: must be a number of seconds above 0")


def _cut_after_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the end of the first stop text in it, and whether there was one."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return (text[: min(ends)], True) if ends else (text, False)
