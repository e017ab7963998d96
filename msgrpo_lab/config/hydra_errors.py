"""Hydra's and OmegaConf's errors, which run over many lines, as one line that names key, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from yaml import YAMLError

from msgrpo_lab.config.schemas import expected_at
from msgrpo_lab.config.value_types import describe
from msgrpo_lab.messages import closest_first, did_you_mean, one_line, show

_MISSING = re.compile(r"Could not (?:find|load) '([^']+)'")
_NAMED_IN = re.compile(r"^In '([^']+)'")
_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class Explanation:
    """One line for the user, and the override that is to blame where one is."""

    line: str
    override: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The names that would have been right."""

    groups: tuple[str, ...]
    keys: tuple[str, ...]
    """Dotted keys of the configuration without the faulty override."""
    options: dict[str, tuple[str, ...]]
    """Options of every group."""


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    overrides: Sequence[Override]
    words: Vocabulary

    @property
    def quoted(self) -> str:
        """What the message puts in quotes first: the key, or the override."""
        match = _QUOTED.search(str(self.error))
        return match.group(1) if match else "?"

    def typed(self, key: str) -> str | None:
        """The override of `key` as it was typed; the last one counts."""
        found = None
        for override in self.overrides:
            if override.get_key_element().lstrip("+~") == key or override.key_or_group == key:
                found = override.input_line
        return found


def explain_syntax(override: str, error: OverrideParseException) -> str:
    """An override that Hydra's grammar does not accept."""
    key, equals, value = one_line(override).partition("=")
    if not equals and not override.startswith("~"):
        return f"{key}: has no value; write {key}=… (for a flag, its dashes: --help)"
    reason = one_line(error.message.split("See https")[0])
    if not value.strip() or value.endswith(","):
        return f"{key}={value}: a value is missing ({reason}); write {key}=value, or {key}=null for none"
    return f"{key}={value}: cannot be read ({reason}); quote a text with special characters, as in '{key}=\"…\"'"


def explain(error: Exception, overrides: Sequence[Override], words: Vocabulary) -> Explanation:
    """What a composition error means."""
    failure = _Failure(error, overrides, words)
    if isinstance(error, MissingConfigException):
        return _missing(failure)
    if isinstance(error, YAMLError):
        return Explanation(_yaml(error))
    text = str(error)
    for beginning, explanation in _BY_BEGINNING.items():
        if text.startswith(beginning):
            return explanation(failure)
    cause = f" ({one_line(str(error.__cause__))})" if error.__cause__ else ""
    return Explanation(f"configuration: {one_line(text)}{cause}; correct the file or the override that it names")


def _missing(failure: _Failure) -> Explanation:
    match = _MISSING.search(str(failure.error))
    if match is None:
        wanted = failure.quoted
        return Explanation(
            f"--config-name={wanted}: there is no {wanted}.yaml; leave it out for the usual configuration"
        )
    group, _, option = match.group(1).rpartition("/")
    options = failure.words.options.get(group) or tuple(getattr(failure.error, "options", None) or ())
    known = ", ".join(closest_first(option, options)) or "none"
    typed = failure.typed(group)
    source = _NAMED_IN.search(str(failure.error))
    where = "" if typed or source is None else f" (named in {source.group(1)}.yaml)"
    line = f"{group}={option}: no such option{where}; {did_you_mean(option, options)}there are: {known}"
    return Explanation(line, typed)


def _yaml(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{Path(mark.name).name}:{mark.line + 1} ({mark.name})" if mark is not None else "a configuration file"
    problem = getattr(error, "problem", None) or one_line(str(error))
    return f"{where}: is not valid YAML ({one_line(problem)}); correct the file"


def _ambiguous(failure: _Failure) -> Explanation:
    raw = failure.quoted
    key, _, value = raw.partition("=")
    line = f"{raw}: several values are a sweep; add -m to run each of them, or write {key}=[{value}] for a list"
    return Explanation(line, failure.typed(key))


def _sweep(failure: _Failure) -> Explanation:
    raw = failure.quoted
    return Explanation(f"{raw}: is a sweep; add -m to run each value", failure.typed(raw.partition("=")[0]))


def _appended(failure: _Failure) -> Explanation:
    key = failure.quoted
    typed = failure.typed(key) or f"+{key}"
    return Explanation(f"{typed}: the key is there already; write it without +", typed)


def _misfit(failure: _Failure) -> Explanation:
    raw = one_line(str(failure.error).removeprefix("Error merging override"))
    cause, key = failure.error.__cause__, raw.partition("=")[0]
    reason = one_line(str(cause).split("full_key")[0]) if cause else "it does not fit"
    remedy = "give a value of the type that the key holds"
    if (expected := expected_at(key.lstrip("+"))) is not None and not is_dataclass(expected[0]):
        reason, remedy = f"must be {describe(expected[0])}", f"give for example {key.lstrip('+')}={show(expected[1])}"
    elif raw.startswith("~"):
        reason, remedy = "this key cannot be left out", f"give it a value, as in {raw[1:].partition('=')[0]}=…"
    return Explanation(f"{raw}: {reason}; {remedy}", failure.typed(key.lstrip("~")))


def _unknown_key(failure: _Failure) -> Explanation:
    key, keys = failure.quoted, failure.words.keys
    typed = failure.typed(key)
    parent, _, last = key.rpartition(".")
    siblings = {name[len(parent) + 1 :].partition(".")[0] for name in keys if name.startswith(f"{parent}.")}
    if not parent:
        names: Iterable[str] = {name.partition(".")[0] for name in keys} | set(failure.words.groups)
        rest = f"{did_you_mean(key, names)}the nearest keys are: {', '.join(closest_first(key, names)[:8])}"
    elif siblings:
        rest = f"{did_you_mean(last, siblings)}the keys of {parent} are: {', '.join(closest_first(last, siblings))}"
    else:
        rest = f"{did_you_mean(key, keys)}the nearest keys are: {', '.join(closest_first(key, keys)[:5])}"
    return Explanation(f"{typed or key}: no such key; {rest}", typed)


def _bad_option(failure: _Failure) -> Explanation:
    for override in failure.overrides:
        group = override.key_or_group
        if group in failure.words.options and not isinstance(override.value(), (str, list)):
            known = ", ".join(failure.words.options[group])
            line = f"{override.input_line}: a group takes the name of one option; there are: {known}"
            return Explanation(line, override.input_line)
    return Explanation("configuration: a group takes the name of one option; correct the defaults list")


def _unresolved_choice(failure: _Failure) -> Explanation:
    """A recipe's name is put together from choices, and one of them is a list or was taken out."""
    for override in failure.overrides:
        options = failure.words.options.get(override.key_or_group)
        if options is not None and (override.is_delete() or isinstance(override.value(), list)):
            line = f"{override.input_line}: one option must be chosen; there are: {', '.join(options)}"
            return Explanation(line, override.input_line)
    return Explanation(f"configuration: {one_line(str(failure.error))}; correct the defaults list")


_BY_BEGINNING: Mapping[str, Callable[[_Failure], Explanation]] = {
    "Could not override": _unknown_key,
    "Could not delete": _unknown_key,
    "Ambiguous value for argument": _ambiguous,
    "Sweep parameters": _sweep,
    "Could not append to config": _appended,
    "Config group override must be a string": _bad_option,
    "Error merging override": _misfit,
    "Error resolving interpolation": _unresolved_choice,
}
"""How Hydra 1.3's messages begin, and what explains them; any other message is passed on as one line."""
