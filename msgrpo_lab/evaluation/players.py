"""Scripted players as contenders: reference lines that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from msgrpo_lab.engines.scripted import ScriptedEngine
from msgrpo_lab.evaluation.contender import Contender, Opened
from msgrpo_lab.lap.parser import FirstWordParser
from msgrpo_lab.lap.prompt import PromptBuilder, PromptTemplate
from msgrpo_lab.lap.words import word_tokenizer
from msgrpo_lab.oracle.players import HoleAvoidingPlayer, OptimalPlayer, Player, RandomPlayer, SearchPlayer
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.types import Sampling


class Cast(NamedTuple):
    """A player and what it plays."""

    make: Callable[[], Player]
    game: type[TextGame] | None
    """The only class of games it plays; None: any."""


PLAYERS: Mapping[str, Cast] = {
    "random": Cast(RandomPlayer, None),
    "optimal": Cast(OptimalPlayer, FrozenLake),
    "hole_avoiding": Cast(HoleAvoidingPlayer, FrozenLake),
    "search": Cast(SearchPlayer, Snake),
}
"""Every player that can be evaluated, by the name it has on the command line."""


def player_contender(name: str) -> Contender:
    """The player of this name in `PLAYERS`."""
    cast = PLAYERS[name]

    def opened() -> Opened:
        return Opened(
            prompt=_any_prompt(),
            engine=ScriptedEngine(player=cast.make()),
            sampling=lambda _: Sampling(),
        )

    return Contender(
        label=name,
        kind="player",
        identity={"player": name},
        open=opened,
        decodings=("sampled",),
        plays=lambda game: cast.game is None or issubclass(game, cast.game),
        has_logprobs=False,
    )


@lru_cache(maxsize=1)
def _any_prompt() -> PromptBuilder:
    """Players look at the game and not at the prompt; it only has to read a word back as the move that it is."""
    return PromptBuilder(PromptTemplate(user="{observation}", parser=FirstWordParser()), word_tokenizer())
