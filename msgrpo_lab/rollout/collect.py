"""Playing episodes: groups of games from one initial state each, all live games moved together turn by turn.

What differs from a textbook loop: a finished episode leaves the batch at once, so no text is produced after a terminal
state; and each turn is prompted with the current state only, so turns are independent samples and contexts stay short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Episode, RolloutBatch, Sampling, Turn


class RolloutObserver(Protocol):
    """Is told how a rollout in flight is getting on."""

    def on_turn(self, turn: int, horizon: int, live: int) -> None:
        """`live` episodes are about to play turn `turn` (from 0) of at most `horizon`."""
        ...


@dataclass(slots=True)
class _Seat:
    """One game in play and what it has seen so far."""

    game: TextGame
    group_id: int
    seed: int
    rng: np.random.Generator
    """Decides what the policy writes in this episode."""
    observation: str
    turns: list[Turn] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    success: bool = False


class Collector:
    """Plays episodes of one game with one prompt. Holds game objects, so that they are made once.

    Args:
        make_game: makes a game; all games it makes are alike.
        prompt: renders observations; its template's parser reads the answers.
    """

    def __init__(self, make_game: Callable[[], TextGame], prompt: PromptBuilder) -> None:
        self.make_game = make_game
        self.prompt = prompt
        self._games: list[TextGame] = []

    @property
    def example_game(self) -> TextGame:
        """A game to read rules, legal actions and horizon from."""
        self._reserve(1)
        return self._games[0]

    def _reserve(self, count: int) -> None:
        self._games += [self.make_game() for _ in range(count - len(self._games))]

    def collect(
        self,
        *,
        seeds: Sequence[int],
        group_size: int,
        members: Sequence[int],
        engine: RolloutEngine,
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        observers: Sequence[RolloutObserver] = (),
    ) -> RolloutBatch:
        """One rollout: `group_size` episodes from each seed's initial state, in group order.

        Args:
            seeds: one environment seed a group.
            group_size: episodes of a group.
            members: per episode (groups × group_size), the number of its stream of chance events.
            engine: completes the prompts.
            sampling: the decoding rule.
            rngs: per episode, the generator that decides the engine's draws.
            observers: told of every turn.
        """
        if len(members) != len(seeds) * group_size:
            raise ValueError(f"members: {len(members)} given for {len(seeds)} groups of {group_size}")
        if len(rngs) != len(members):
            raise ValueError(f"rngs: {len(rngs)} given for {len(seeds)} groups of {group_size}")
        self._reserve(len(members))
        seats = []
        for number, (game, member, rng) in enumerate(zip(self._games, members, rngs, strict=False)):
            seed = int(seeds[number // group_size])
            observation, _ = game.reset(seed=seed, options={"member": int(member)})
            seats.append(_Seat(game=game, group_id=number // group_size, seed=seed, rng=rng, observation=observation))
        live, turn = seats, 0
        while live:
            for observer in observers:
                observer.on_turn(turn, live[0].game.horizon, len(live))
            self._play_turn(live, engine, sampling)
            live = [seat for seat in live if not (seat.terminated or seat.truncated)]
            turn += 1
        return RolloutBatch(
            episodes=tuple(
                Episode(
                    group_id=seat.group_id,
                    seed=seat.seed,
                    turns=tuple(seat.turns),
                    terminated=seat.terminated,
                    truncated=seat.truncated,
                    success=seat.success,
                )
                for seat in seats
            ),
            group_index=np.repeat(np.arange(len(seeds)), group_size),
        )

    def _play_turn(self, live: Sequence[_Seat], engine: RolloutEngine, sampling: Sampling) -> None:
        """Moves every live game by one turn."""
        rules, actions = live[0].game.rules, live[0].game.legal_actions
        prompts = [self.prompt.render(rules, seat.observation, actions) for seat in live]
        engine.observe([seat.game for seat in live])
        completions = engine.generate(prompts, sampling, [seat.rng for seat in live], self.prompt.settled(actions))
        for seat, completion in zip(live, completions, strict=True):
            parsed = self.prompt.parse(completion.text, actions)
            state_key = seat.game.state_key()
            observation, reward, terminated, truncated, info = seat.game.step(parsed.action)
            seat.turns.append(
                Turn(
                    observation=seat.observation,
                    state_key=state_key,
                    completion=completion,
                    parsed=parsed,
                    executed_action=info["executed_action"],
                    reward=float(reward),
                    game_reward=float(info["game_reward"]),
                )
            )
            seat.observation = observation
            seat.terminated, seat.truncated, seat.success = terminated, truncated, info["success"]


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Means over episodes (returns, success, length) or over turns (validity), without a prefix.

    `return_mean` and `return_std` are of the game's own return, unshaped and without penalties; `shaped_return_mean` is
    of what credit is assigned from. `zero_std_groups` is the share of groups whose episodes all have the same return
    (to 1e-9), which teach nothing under group-relative credit. `cut_answers` is
    the share of answers that ended at `max_new_tokens`.
    """
    game_return = np.array([episode.game_ret for episode in batch.episodes])
    shaped_return = np.array([episode.ret for episode in batch.episodes])
    turns = [turn for episode in batch.episodes for turn in episode.turns]
    spread = [np.ptp(shaped_return[batch.group_index == group]) for group in np.unique(batch.group_index)]
    return {
        "return_mean": float(game_return.mean()),
        "return_std": float(game_return.std()),
        "shaped_return_mean": float(shaped_return.mean()),
        "success_rate": float(np.mean([episode.success for episode in batch.episodes])),
        "valid_action_rate": float(np.mean([turn.parsed.action is not None for turn in turns])),
        "episode_length": float(batch.num_turns.mean()),
        "completion_tokens": float(np.mean([len(turn.completion.token_ids) for turn in turns])),
        "cut_answers": float(np.mean([turn.completion.finish_reason == "length" for turn in turns])),
        "zero_std_groups": float(np.mean(np.array(spread) < 1e-9)),
        "distinct_prompts": float(len({turn.completion.prompt_ids.tobytes() for turn in turns})),
    }


def top_action_share(batch: RolloutBatch) -> float:
    """Share of the most frequent action among all that were played, fallbacks too; in [1 / actions, 1]."""
    played = [turn.executed_action for episode in batch.episodes for turn in episode.turns]
    return float(np.bincount(played).max() / len(played))


def action_entropy(batch: RolloutBatch, constrained: bool) -> float:
    """Entropy (nats) of the policy over *actions*, averaged over the turns of a rollout.

    With constrained decoding an action is exactly one completion, so −log π(a|s) is an unbiased estimate at every turn.
    With free decoding many texts give one action: the entropy of the actions observed at equal prompts is taken, with
    the Miller–Madow correction for small counts; prompts met once say nothing and are left out (nan if there are none).
    """
    turns = [turn for episode in batch.episodes for turn in episode.turns]
    if constrained:
        return float(np.mean([-turn.completion.logprobs.sum() for turn in turns]))
    actions_of: dict[bytes, list[int]] = {}
    for turn in turns:
        action = -1 if turn.parsed.action is None else turn.parsed.action
        actions_of.setdefault(turn.completion.prompt_ids.tobytes(), []).append(action)
    total, visits = 0.0, 0
    for actions in actions_of.values():
        if len(actions) > 1:
            count = np.unique(actions, return_counts=True)[1]
            share = count / count.sum()
            total += len(actions) * float(-(share * np.log(share)).sum() + (len(count) - 1) / (2 * count.sum()))
            visits += len(actions)
    return total / visits if visits else float("nan")
