"""Players without a language model: reference lines, and policies for tests. Each returns the word it plays."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Float

from msgrpo_lab.oracle.compact import compact_ceiling
from msgrpo_lab.oracle.frozen_lake import (
    best_fixed_mix,
    hole_avoiding_policy,
    hole_avoiding_success,
    optimal_action,
    optimal_success,
    random_success,
)
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import Board, Cell, distance, free_moves, neighbours, threatened


class Player(Protocol):
    """Something that plays a text game."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """The word it plays in the game's current state; all its chance comes from `rng`."""
        ...


@dataclass(frozen=True, slots=True)
class RandomPlayer:
    """Every legal action with the same probability."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A legal word drawn uniformly."""
        return game.legal_actions[int(rng.integers(len(game.legal_actions)))]


@dataclass(frozen=True, slots=True)
class FixedPlayer:
    """The same word in every state, legal or not."""

    word: str

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """The word."""
        return self.word


@dataclass(frozen=True, slots=True)
class MixPlayer:
    """Ignores the prompt: every word is drawn from one distribution.

    Raises:
        ValueError: the probabilities are negative, or do not sum to 1.
    """

    probabilities: Mapping[str, float]
    _words: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _cumulative: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that it is a distribution."""
        values = list(self.probabilities.values())
        if min(values, default=-1.0) < 0 or abs(sum(values) - 1) > 1e-6:
            raise ValueError(f"probabilities={dict(self.probabilities)}: must be non-negative and sum to 1")
        object.__setattr__(self, "_words", tuple(self.probabilities))
        object.__setattr__(self, "_cumulative", tuple(np.cumsum(values).tolist()))

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """A word drawn from the distribution."""
        index = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))
        return self._words[index]


@dataclass(frozen=True, slots=True)
class TextPlayer:
    """A memoryless policy on texts: the stand-in for a language policy whose action probabilities are known.

    Args:
        prob_of: for each text, the probabilities of the legal actions in their order and, last, of ⊥.
    """

    prob_of: Mapping[str, Float[np.ndarray, " B"]]

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A word drawn for the text that the game shows; the empty word is ⊥.

        Raises:
            ValueError: the text is not in the table.
        """
        text = game.render_text()
        if text not in self.prob_of:
            raise ValueError(f"TextPlayer: knows {len(self.prob_of)} texts, not {text!r}; add it to the table")
        cumulative_B = np.cumsum(self.prob_of[text])
        answer = int(np.searchsorted(cumulative_B, rng.random() * cumulative_B[-1], side="right"))
        return (*game.legal_actions, "")[answer]


@dataclass(frozen=True, slots=True)
class HoleAvoidingPlayer:
    """Frozen Lake: towards the goal and around adjacent holes, ties at random (see `hole_avoiding_policy`)."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A word drawn from the policy.

        Raises:
            ValueError: the game is not Frozen Lake.
        """
        lake_game = _frozen_lake(self, game)
        probability_A = _hole_avoiding(lake_game.lake)[lake_game.position]
        return game.legal_actions[int(rng.choice(len(probability_A), p=probability_A))]


@dataclass(frozen=True, slots=True)
class OptimalPlayer:
    """Frozen Lake: the best action for the turns that are left, by dynamic programming."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """The word of a best action.

        Raises:
            ValueError: the game is not Frozen Lake, or the episode is over.
        """
        return game.legal_actions[optimal_action(_frozen_lake(self, game))]


@dataclass(frozen=True, slots=True)
class SearchPlayer:
    """Snake: breadth-first search to the nearest reachable good item. A named reference, not the optimum. [D]

    It treats the board as it stands as fixed: it never enters walls, its own body (less the tail), other snakes' cells,
    cells another head may enter next, or poison. Without a path it moves to a neighbouring cell free of all that, with
    the most ways on and at random among those; failing that, to the least bad one.
    """

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """The word of the first move on a shortest path, or of a safe move.

        Raises:
            ValueError: the game is not Snake, or the snake is dead.
        """
        if not isinstance(game, Snake):
            raise ValueError(f"SearchPlayer: plays Snake only, not {type(game).__name__}; choose RandomPlayer instead")
        board = game.board
        if not board.player:
            raise ValueError("SearchPlayer: the snake is dead; ask for a move before the episode's end")
        solid = {*board.player[:-1], *(cell for body in board.others for cell in body)}
        poison = game.menu.poison(board)
        targets = {cell for _, cell in game.menu.good(board)}
        move = _first_move(board, targets, solid | poison, solid | poison | threatened(board))
        return game.legal_actions[_safe_move(board, solid, poison, rng) if move is None else move]


def _first_move(board: Board, targets: set[Cell], avoided: set[Cell], avoided_next: set[Cell]) -> int | None:
    """First move of a shortest path from the head to a target; None if there is no path.

    Threatened cells count for the first move only: by the second, the other snakes are elsewhere.
    """
    head = board.player[0]
    queue: deque[tuple[Cell, int]] = deque()
    seen = {head}
    entries = [
        (min((distance(cell, target) for target in targets), default=0), move, cell)
        for move, cell in enumerate(neighbours(head, board.size))
        if cell is not None and cell not in avoided_next
    ]
    for _, move, cell in sorted(entries):
        seen.add(cell)
        queue.append((cell, move))
    while queue:
        cell, first = queue.popleft()
        if cell in targets:
            return first
        for following in neighbours(cell, board.size):
            if following is not None and following not in seen and following not in avoided:
                seen.add(following)
                queue.append((following, first))
    return None


def _safe_move(board: Board, solid: set[Cell], poison: frozenset[Cell], rng: np.random.Generator) -> int:
    """A random move among those of the mildest danger: none, then poison, then another head, then certain death."""
    threats = threatened(board)

    def danger(cell: Cell | None) -> tuple[int, int]:
        if cell is None or cell in solid:
            return (3, 0)
        ways_on = len(free_moves((cell, *board.player[:-1]), board.size))
        return (2 if cell in threats else 1 if cell in poison else 0, -ways_on)

    dangers = [danger(cell) for cell in neighbours(board.player[0], board.size)]
    mildest = [move for move in range(4) if dangers[move] == min(dangers)]
    return mildest[int(rng.integers(len(mildest)))]


@lru_cache(maxsize=4096)
def _hole_avoiding(lake: Lake) -> Float[np.ndarray, "S A"]:
    return hole_avoiding_policy(lake)


def _frozen_lake(player: object, game: TextGame) -> FrozenLake:
    if not isinstance(game, FrozenLake):
        raise ValueError(
            f"{type(player).__name__}: plays FrozenLake only, not {type(game).__name__}; choose RandomPlayer instead"
        )
    return game


_EPISODES = 1000
_CANDIDATE_EPISODES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a reference player does on the given seeds."""

    return_mean: float
    """Mean game return of an episode."""
    success_rate: float
    """Share of episodes with success, or its probability."""
    standard_error: float
    """Monte-Carlo standard error of `return_mean` for these seeds; 0.0 when exact."""
    exact: bool
    """Whether the score was computed instead of simulated."""


def baseline_names(game: TextGame) -> tuple[str, str]:
    """Names of the players at 0 and at 1 of the normalised score, (score − low) / (high − low).

    Raises:
        ValueError: no upper end is known for this game.
    """
    if isinstance(game, FrozenLake):
        return "random", "optimal"
    if isinstance(game, Snake):
        return "random", "search"
    raise ValueError(f"{type(game).__name__}: no upper reference is known; report raw scores, or add one to the oracle")


def reference_scores(
    make_game: Callable[[], TextGame], seeds: Sequence[int], rng: np.random.Generator
) -> dict[str, Score]:
    """Scores of the reference players on the initial states of `seeds`.

    Frozen Lake (exact): `random`, `ignores_prompt` (best fixed mix of actions for these very maps), `hole_avoiding`,
    `optimal`, and with the compact view `compact_ceiling` (the best policy on texts that was found: a lower bound of
    what the view allows). Other games (simulated, at least 1000 episodes a player): `random`, `ignores_prompt` (the
    best of eleven fixed mixes, chosen and then scored on separate episodes), and for Snake `search`.

    Args:
        make_game: makes a game of the scenario.
        seeds: initial states; the scores are means over them.
        rng: all chance of simulated players and games.

    Raises:
        ValueError: there are no seeds.
    """
    if not seeds:
        raise ValueError("seeds=[]: no initial states; give at least one seed")
    game = make_game()
    if isinstance(game, FrozenLake):
        return _frozen_lake_scores(game, seeds)
    random_rng, mix_rng, search_rng = rng.spawn(3)
    random = simulate(game, RandomPlayer(), seeds, random_rng)
    mix = simulate(game, _best_mix_player(game, seeds, mix_rng), seeds, mix_rng)
    # The random player ignores the prompt too, so that chance in the choice must not put the best mix below it.
    scores = {"random": random, "ignores_prompt": max(random, mix, key=lambda score: score.return_mean)}
    if isinstance(game, Snake):
        scores["search"] = simulate(game, SearchPlayer(), seeds, search_rng)
    return scores


def play(game: TextGame, player: Player, seed: int, member: int, rng: np.random.Generator) -> tuple[float, bool]:
    """One episode of `player`: its game return and success. `member` picks the game's stream of chance events."""
    game.reset(seed=seed, options={"member": member})
    total, done, success = 0.0, False, False
    while not done:
        _, _, terminated, truncated, info = game.step(game.text_to_action(player(game, rng)))
        total += info["game_reward"]
        success = info["success"]
        done = terminated or truncated
    return total, success


def simulate(
    game: TextGame, player: Player, seeds: Sequence[int], rng: np.random.Generator, *, episodes: int = _EPISODES
) -> Score:
    """Score of `player` from at least `episodes` episodes, spread evenly over the seeds, two or more each.

    The standard error is that of the mean over these seeds: only the spread within a seed counts.
    """
    members = max(2, math.ceil(episodes / len(seeds)))
    # Streams of chance of their own, so that a player is not scored on the very events an evaluation will draw.
    first = int(rng.integers(2**31))
    played = [[play(game, player, seed, first + i, rng) for i in range(members)] for seed in seeds]
    return_NM = np.array([[total for total, _ in row] for row in played])
    return Score(
        return_mean=float(return_NM.mean()),
        success_rate=float(np.mean([[success for _, success in row] for row in played])),
        standard_error=float(np.sqrt(return_NM.var(axis=1, ddof=1).mean() / return_NM.size)),
        exact=False,
    )


def _frozen_lake_scores(game: FrozenLake, seeds: Sequence[int]) -> dict[str, Score]:
    lakes, values = [], []
    for seed in seeds:
        game.reset(seed=seed)
        lakes.append(game.lake)
        values.append((random_success(game), hole_avoiding_success(game), optimal_success(game)))
    random, hole_avoiding, optimal = np.mean(values, axis=0).tolist()
    _, ignores_prompt = best_fixed_mix(lakes, game.horizon)
    success = {
        "random": random,
        "ignores_prompt": ignores_prompt,
        "hole_avoiding": hole_avoiding,
        "optimal": optimal,
    }
    if game.observation == "compact":
        success["compact_ceiling"] = compact_ceiling(lakes, game.horizon).success
    return {
        name: Score(return_mean=value, success_rate=value, standard_error=0.0, exact=True)
        for name, value in success.items()
    }


def _best_mix_player(game: TextGame, seeds: Sequence[int], rng: np.random.Generator) -> MixPlayer:
    """The best of the fixed words, their half-and-half mixes and the uniform mix, by simulated return."""
    words = game.legal_actions
    candidates = [MixPlayer({word: 1 / len(words) for word in words})]
    for one, other in itertools.combinations_with_replacement(words, 2):
        candidates.append(MixPlayer({one: 1.0} if one == other else {one: 0.5, other: 0.5}))
    chosen = [seeds[i] for i in rng.permutation(len(seeds))[:_CANDIDATE_EPISODES]]
    scores = [simulate(game, player, chosen, rng, episodes=_CANDIDATE_EPISODES).return_mean for player in candidates]
    return candidates[int(np.argmax(scores))]
