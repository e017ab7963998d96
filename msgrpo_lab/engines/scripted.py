"""An engine without a model: a scripted player answers. For tests and reference lines, not for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from msgrpo_lab.engines.base import Settled, check_lengths
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.oracle.players import Player
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class ScriptedEngine:
    """A player that looks at the game itself and writes its move as one word.

    Its completions carry the log-probability 0; they are not the policy's, so training refuses this engine.
    """

    samples_policy = False

    def __init__(self, *, player: Player) -> None:
        self.player = player
        self._games: Sequence[TextGame] = ()
        self._tokenizer = word_tokenizer()
        self._version = 0

    def sync(self, policy: LanguagePolicy, version: int) -> None:  # noqa: ARG002
        """The player is what it is; only the version is noted."""
        self._version = version

    def observe(self, games: Sequence[TextGame]) -> None:
        """See `RolloutEngine.observe`."""
        self._games = games

    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,  # noqa: ARG002
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,  # noqa: ARG002
    ) -> list[Completion]:
        """The player's word in each of the games shown last."""
        if len(prompts) != len(self._games):
            raise RuntimeError(f"engine: {len(prompts)} prompts for {len(self._games)} observed games")
        check_lengths(prompts, rngs)
        completions = []
        for prompt, game, rng in zip(prompts, self._games, rngs, strict=True):
            text = self.player(game, rng)
            token_ids = np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
            completions.append(
                Completion(
                    prompt_ids=prompt,
                    token_ids=token_ids,
                    logprobs=np.zeros(len(token_ids), dtype=np.float32),
                    text=text,
                    finish_reason="stop",
                    policy_version=self._version,
                )
            )
        return completions

    def metrics(self) -> Mapping[str, float]:
        """A player has nothing to say of itself."""
        return {}

    def close(self) -> None:
        """Lets go of the games."""
        self._games = ()
