"""`TextGame`: a text-mediated stochastic game (paper section 1) on gymnasium's interface.

Beyond `gymnasium.Env` a game has the TSMG's two maps, state → text (`render_text`, `rules`) and text → action or ⊥
(`text_to_action`; None stands for ⊥), a rule for ⊥ (a penalty and a fallback action), potential-based shaping, and
exact forking (`snapshot`, `restore`).
"""

from __future__ import annotations

import math
import operator
import string
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast, get_args

import gymnasium
import numpy as np
from gymnasium import spaces

LARGEST = 1e6
"""Rewards and penalties are at most this: far beyond any use, and small enough that no sum of them overflows."""


def whole_number(key: str, value: Any, *, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high].

    Raises:
        ValueError: it is no whole number, or lies outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"env.{key}={value!r}: must be a whole number, {_range(low, high)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"env.{key}={value!r}: must be {_range(low, high)}")
    return value


def real_number(
    key: str, value: Any, *, low: float | None = None, high: float | None = None, remedy: str = ""
) -> float:
    """`value` as a float in [low, high]; None leaves a side open, up to `LARGEST`.

    Raises:
        ValueError: it is no finite number, or lies outside the range. `remedy` is appended to the message.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"env.{key}={value!r}: must be a finite number, {_range(low, high)}{remedy}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"env.{key}={value!r}: must be {_range(low, high)}{remedy}")
    if abs(value) > LARGEST:
        raise ValueError(f"env.{key}={value!r}: must be at most {LARGEST:g} in size{remedy}")
    return float(value)


def one_of(key: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"env.{key}={value!r}: must be one of {', '.join(choices)}")
    return value


def truth(key: str, value: Any) -> bool:
    """`value` if it is a bool.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"env.{key}={value!r}: must be true or false")
    return value


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "of any size"
    if high is None:
        return f"at least {low}"
    if low is None:
        return f"at most {high}"
    return f"at least {low} and at most {high}"


LAYOUT_STREAM = 0
"""Stream of a seed that lays out the initial state."""
DYNAMICS_STREAM = 1
"""Stream of a seed, one a group member, that decides what happens afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that decides how a game goes on. Opaque to callers, picklable."""

    settings: tuple[Hashable, ...]
    """Arguments of the game it was taken from."""
    seed: int
    member: int
    steps: int
    over: bool
    state: Any
    dynamics_state: Mapping[str, Any] | None
    """State of the generator of slips, other players and fallbacks; None if nothing was drawn yet."""
    reset_state: Mapping[str, Any]
    """State of gymnasium's own generator, which draws the seed of a `reset()` without one."""


def stream(seed: int, *key: int) -> np.random.Generator:
    """Independent generator of `seed` for `key`, apart from the one that draws gymnasium's maps from the same seed.

    A spawn key, not a longer list of entropy: `SeedSequence([seed, 0])` is the very stream of `SeedSequence(seed)`.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def generator_at(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on from `state` of a PCG64."""
    bits = np.random.PCG64(0)
    bits.state = cast("Any", dict(state))
    return np.random.Generator(bits)


ObservationStyle = Literal["compact", "relative", "paper"]
OBSERVATION_STYLES: tuple[ObservationStyle, ...] = get_args(ObservationStyle)

CHARSET = string.ascii_letters + string.digits + string.punctuation + " \n"
"""Every character that a game's text may contain."""


@lru_cache(maxsize=1)
def _text_space() -> spaces.Text:
    """The observation space, made once: thousands of games share it, and making it takes milliseconds."""
    return spaces.Text(max_length=8192, min_length=1, charset=CHARSET)


class TextGame(gymnasium.Env[str, int | None], ABC):
    """A game that is seen and played through text.

    A subclass implements the abstract members below: its rules, its initial state, one move, and its texts. This class
    owns turns, ⊥, shaping, generators and forking, so that every game treats them alike.

    Args:
        horizon: turns after which the episode is truncated; at least 1.
        observation: `compact` (few short lines, a partial view), `relative` (the same and everything else as offsets
            from the player: complete) or `paper` (coordinates and drawn grid: complete).
        invalid_penalty: subtracted from the reward of a turn that is ⊥; at least 0.
        fallback_action: what ⊥ executes, a legal action's word, or `random` (drawn from the game's own generator).
        shaping: scale of the potential-based shaping; 0 switches it off.
        shaping_gamma: γ of the shaping term γΦ(s′) − Φ(s), in [0, 1].

    Raises:
        ValueError: an argument is out of range; one line with key, value and remedy.
    """

    legal_actions: ClassVar[tuple[str, ...]]
    """Display words; their order is the order of the action indices."""
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  gymnasium declares it as an instance attribute

    def __init__(
        self,
        *,
        horizon: int,
        observation: ObservationStyle,
        invalid_penalty: float,
        fallback_action: str,
        shaping: float,
        shaping_gamma: float,
    ) -> None:
        """Check and keep the arguments."""
        self.horizon = whole_number("horizon", horizon, low=1)
        one_of("observation", observation, OBSERVATION_STYLES)
        self.observation: ObservationStyle = observation
        self.invalid_penalty = real_number("invalid_penalty", invalid_penalty, low=0)
        self.fallback_action = one_of("fallback_action", fallback_action, ("random", *self.legal_actions))
        self.shaping = real_number("shaping", shaping, low=0)
        self.shaping_gamma = real_number("shaping_gamma", shaping_gamma, low=0, high=1)
        self.observation_space = _text_space()
        # ⊥ is no member of the action space: gymnasium's wrappers sample from it, and ⊥ is never a choice.
        self.action_space = cast("spaces.Space[int | None]", spaces.Discrete(len(self.legal_actions)))
        self.steps = 0
        """Turns taken in the current episode."""
        self._over = True
        self._seed = 0
        self._member = 0
        self._dynamics: np.random.Generator | None = None
        self._potential = 0.0
        self._action_of = {word.lower(): index for index, word in enumerate(self.legal_actions)}

    # What a game implements -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def rules(self) -> str:
        """Static text of the scenario in the chosen observation style: the same in every state, so prompts share it."""

    @abstractmethod
    def render_text(self) -> str:
        """The current state as text, without the rules."""

    @abstractmethod
    def state_key(self) -> Hashable:
        """Equal iff the game state is the same: map and positions, whatever the time."""

    @abstractmethod
    def potential(self) -> float:
        """Φ(s) of the current state, in [0, 1]; 0 in terminal states."""

    @abstractmethod
    def _succeeded(self) -> bool:
        """Whether the game's own success criterion holds now."""

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Put the game into the initial state of `seed`."""

    @abstractmethod
    def _advance(self, action: int) -> tuple[float, bool]:
        """Play one legal action; returns the game's own reward and whether a terminal state was reached."""

    @abstractmethod
    def _get_state(self) -> Any:
        """The game's state as an immutable, picklable value."""

    @abstractmethod
    def _set_state(self, state: Any) -> None:
        """Return to a state got from `_get_state`."""

    @abstractmethod
    def _settings(self) -> tuple[Hashable, ...]:
        """Arguments that a snapshot must agree with."""

    # gymnasium's interface --------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        The initial state is a function of `seed` alone. `options={"member": i}` (default 0) picks the i-th stream of
        chance events for that seed, so that the members of a group share the initial state and slip independently.
        Without a seed, the next one is drawn from gymnasium's generator.

        Raises:
            ValueError: an unknown option, or a member that is no whole number ≥ 0.
        """
        seed = None if seed is None else operator.index(seed)
        super().reset(seed=seed)
        self._member = _member(options)
        self._seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._dynamics = None
        self.steps = 0
        self._over = False
        self._begin(self._seed)
        self._potential = self.potential()
        return self.render_text(), {"seed": self._seed, "member": self._member}

    def step(self, action: int | None) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn; None is ⊥.

        reward = game reward + shaping·(γΦ(s′) − Φ(s)) − penalty if ⊥. Φ is 0 in terminal states but not where the
        horizon cuts the episode: a truncated episode keeps shaping·Φ(s_T) (γ = 1), so with a finite horizon strict
        invariance of the optimal policy (Ng, Harada & Russell 1999) is lost by at most `shaping` in return.

        Returns:
            Observation, reward, terminated, truncated, and info: `game_reward` (unshaped, unpenalised),
            `executed_action`, `invalid` (the turn was ⊥), `success` (meaningful at the episode's end).

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or none was begun.
            ValueError: `action` is no index of a legal action.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("step: the episode is over or was never begun; call reset() first")
        executed = self._fallback() if action is None else self._checked(action)
        game_reward, terminated = self._advance(executed)
        self.steps += 1
        truncated = not terminated and self.steps >= self.horizon
        self._over = terminated or truncated
        reward = game_reward
        if self.shaping:
            potential = self.potential()
            reward += self.shaping * (self.shaping_gamma * potential - self._potential)
            self._potential = potential
        if action is None:
            reward -= self.invalid_penalty
        info = {
            "game_reward": game_reward,
            "executed_action": executed,
            "invalid": action is None,
            "success": self._succeeded(),
        }
        return self.render_text(), reward, terminated, truncated, info

    # The TSMG's text → action map, and forking ------------------------------------------------------------------

    def text_to_action(self, word: str) -> int | None:
        """Index of the legal action that `word` names, trimmed and in any case; None (⊥) if it names none."""
        return self._action_of.get(word.strip().lower())

    def snapshot(self) -> Snapshot:
        """The game as it stands, generators included: `restore` replays the same future."""
        return Snapshot(
            settings=self._settings(),
            seed=self._seed,
            member=self._member,
            steps=self.steps,
            over=self._over,
            state=self._get_state(),
            dynamics_state=None if self._dynamics is None else self._dynamics.bit_generator.state,
            reset_state=self.np_random.bit_generator.state,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`, taken from this game or from one with the same arguments.

        Raises:
            ValueError: the snapshot is of a game with other arguments.
        """
        if snapshot.settings != self._settings():
            raise ValueError(
                f"snapshot of {snapshot.settings}: does not fit {self._settings()}; "
                "restore it into a game made with the same arguments"
            )
        self._seed, self._member = snapshot.seed, snapshot.member
        self.steps, self._over = snapshot.steps, snapshot.over
        self._dynamics = None if snapshot.dynamics_state is None else generator_at(snapshot.dynamics_state)
        self._np_random = generator_at(snapshot.reset_state)
        self._set_state(snapshot.state)
        self._potential = self.potential()

    @property
    def dynamics(self) -> np.random.Generator:
        """Generator of everything that happens after the initial state; made when first needed."""
        if self._dynamics is None:
            self._dynamics = stream(self._seed, DYNAMICS_STREAM, self._member)
        return self._dynamics

    def _fallback(self) -> int:
        if self.fallback_action == "random":
            return int(self.dynamics.integers(len(self.legal_actions)))
        return self.legal_actions.index(self.fallback_action)

    def _checked(self, action: int) -> int:
        index = operator.index(action)
        if not 0 <= index < len(self.legal_actions):
            raise ValueError(
                f"action={action}: must be 0 to {len(self.legal_actions) - 1}, or None for an illegal text"
            )
        return index


def _member(options: Mapping[str, Any] | None) -> int:
    options = {} if options is None else options
    unknown = sorted(set(options) - {"member"})
    if unknown:
        raise ValueError(f"options.{unknown[0]}={options[unknown[0]]!r}: unknown reset option; the only one is member")
    member = operator.index(options.get("member", 0))
    if member < 0:
        raise ValueError(f"options.member={member}: must be at least 0")
    return member
