"""The check of a composed configuration: every mistake in it, collected before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config.components import UNRESOLVED, check_component, components, locate, parameters_of, plain
from msgrpo_lab.config.rules import check_across, check_model, check_secrets, check_sections
from msgrpo_lab.messages import ConfigError, Mistake, one_line, show

LIGHT_GROUPS = (
    "env",
    "sampler",
    "credit",
    "loss",
    "optim",
    "evaluation",
    "callbacks",
    "prompt",
    "model.source",
    "engine",
    "logger",
)
"""Components (or sections of them) whose constructors load nothing, so that checking may call them and pass on what
they refuse."""

SHAPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "env": ("a text game", ("reset", "step", "render_text", "text_to_action")),
    "model.source": ("a model source", ("load",)),
    "engine": ("a rollout engine", ("generate", "sync", "close")),
    "sampler": ("an episode sampler", ("__call__",)),
    "credit": ("a credit rule", ("__call__",)),
    "loss": ("a loss", ("__call__", "surrogate")),
    "callbacks": ("a Lightning callback", ("on_fit_start", "on_train_end")),
    "logger": ("a tracking component", ("start", "finish")),
}
"""What the components of a group are, and methods that tell one; a class without them is not even constructed."""

MODEL_IS_READ = frozenset({"model", "prompt", "env", "rollout", "update", "trainer"})
"""Sections of a configuration that trains a model, whose shape and tokenizer are then looked at."""
_INTERPOLATED = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)")

SUPPLIED: Mapping[str, frozenset[str]] = {}
"""Parameters that the program passes when it instantiates a group, by group."""


def validate(
    cfg: DictConfig, *, light_groups: Sequence[str] = LIGHT_GROUPS, choices: Mapping[str, str | None] | None = None
) -> None:
    """Check a composed configuration.

    Components (nodes with a `_target_`) are held against the signature and annotations of what they name, plain
    sections against their schemas, and keys against each other. Components of `light_groups` are constructed once, so
    that what their constructors refuse is reported as well, and are asked to `check()` the world outside if they can.

    Args:
        cfg: the composed configuration, without Hydra's own node.
        light_groups: see `LIGHT_GROUPS`.
        choices: the option chosen of each group: what a mistake then calls it. None: by the class.

    Raises:
        ConfigError: something is wrong; the message holds one line for every mistake.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    mistakes = list(check_secrets(_texts(raw)))
    tree = plain(cfg, mistakes)
    lines = [str(mistake) for mistake in mistakes]
    for path, node in components(tree):
        supplied = SUPPLIED.get(path.partition(".")[0], frozenset()) if "." not in path else frozenset()
        lines += [str(mistake) for mistake in check_component(path, node, supplied)]
    lines += [str(mistake) for mistake in check_sections(tree)]
    lines += [str(mistake) for mistake in _check_engine(tree, choices or {})]
    lines += [str(mistake) for mistake in _check_oracle(tree, choices or {})]
    lines += [str(mistake) for mistake in check_across(tree)]
    for group in light_groups:
        flawless = not any(line.startswith((f"{group}.", f"{group}=")) for line in lines)
        node = _node(tree, group)
        if flawless:
            for path, component in _components_of(group, node):
                misshapen = [str(mistake) for mistake in _check_shape(path, group, component)]
                lines += misshapen or list(_construct(path, component))
    if not lines and tree.keys() >= MODEL_IS_READ:
        lines = [str(mistake) for mistake in check_model(tree)]
    lines = _one_a_key(_without_echoes(lines, raw))
    if lines:
        raise ConfigError(lines)


def _one_a_key(lines: Sequence[str]) -> list[str]:
    """The last line of each key: rules that know more of a key are asked later."""
    return list({line.partition("=")[0]: line for line in lines}.values())


def _without_echoes(lines: Sequence[str], raw: Any) -> list[str]:
    """`lines` without those of keys that only repeat, by `${…}`, a key that is wrong itself."""
    named = {line.partition("=")[0] for line in lines}
    echoes = set()
    for key, text in _texts(raw):
        sources = _INTERPOLATED.findall(text)
        if any(source == wrong or source.startswith(f"{wrong}.") for source in sources for wrong in named - {key}):
            echoes.add(key)
    return [line for line in lines if line.partition("=")[0] not in echoes]


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The texts under `value` by dotted key."""
    if isinstance(value, str):
        yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _texts(child, f"{path}.{key}" if path else str(key))


def _check_engine(tree: Mapping[str, Any], choices: Mapping[str, str | None]) -> Iterator[Mistake]:
    """A player without a model cannot be trained (configurations with an `update` section train)."""
    engine = _target_of(tree, "engine") if "update" in tree else None
    if engine is not None and getattr(engine, "samples_policy", True) is False:
        problem = "its answers are not the policy's and cannot train it"
        yield Mistake("engine", choices.get("engine") or engine.__name__, problem, "use engine=hf to train")


def _check_oracle(tree: Mapping[str, Any], choices: Mapping[str, str | None]) -> Iterator[Mistake]:
    """A credit rule that reads exact values needs a game that has them."""
    rule, game = _target_of(tree, "credit"), _target_of(tree, "env")
    if rule is None or game is None:
        return
    from msgrpo_lab.oracle.frozen_lake import has_oracle

    if getattr(rule, "needs_oracle", False) is True and not has_oracle(game):
        problem = f"it reads exact values, and env={choices.get('env') or game.__name__} has no oracle"
        remedy = "use another credit rule, or a Frozen Lake scenario such as env=frozenlake"
        yield Mistake("credit", choices.get("credit") or rule.__name__, problem, remedy)


def _target_of(tree: Mapping[str, Any], group: str) -> Callable[..., Any] | None:
    """What a group's `_target_` names; None where it names nothing, which is told with the component."""
    node = tree.get(group)
    target = node.get("_target_") if isinstance(node, Mapping) else None
    try:
        return locate(target) if isinstance(target, str) else None
    except ImportError:
        return None


def _node(tree: Mapping[str, Any], group: str) -> Any:
    """The node at a dotted key; None where there is none, or where `model.path` takes the source's place."""
    node: Any = tree
    for key in group.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        if key == "source" and node.get("path") is not None:
            return None
        node = node[key]
    return node


def _components_of(group: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The component that a group is, or those that a section such as `callbacks` holds, by key."""
    if isinstance(node, Mapping) and "_target_" not in node:
        yield from ((f"{group}.{name}", child) for name, child in node.items() if child is not None)
    elif node is not None:
        yield group, node


def _check_shape(path: str, group: str, node: Any) -> Iterator[Mistake]:
    """A component that is none, or not of its group's kind."""
    if group not in SHAPES or node is UNRESOLVED:
        return
    kind, methods = SHAPES[group]
    if not isinstance(node, Mapping) or "_target_" not in node:
        remedy = f"give {path}._target_=…" + (", or null to leave it out" if path != group else "")
        yield Mistake(path, node, f"must be {kind}", remedy)
        return
    target = _target_of({"node": node}, "node")
    if target is not None and (lacking := [name for name in methods if not hasattr(target, name)]):
        problem = f"is not {kind}: it has no {', '.join(lacking)}"
        yield Mistake(f"{path}._target_", node["_target_"], problem, f"name {kind}, as the files of conf/ do")


def _construct(group: str, node: Any) -> Iterator[str]:
    """What the constructor of a light component, or its `check`, has against its values."""
    if not isinstance(node, Mapping) or "_target_" not in node or _has_unresolved(node):
        return
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        component = instantiate(dict(node))
    except InstantiationException as error:
        cause = error.__cause__ or error
        yield _attributed(group, node, cause)
        return
    try:
        if callable(check := getattr(component, "check", None)):
            check()
    except (ValueError, OSError) as error:
        yield _attributed(group, node, error)
    finally:
        if callable(close := getattr(component, "close", None)):
            close()


def _attributed(group: str, node: Mapping[str, Any], error: BaseException) -> str:
    """What a component refused, with its group in front unless it names the group's key itself, and a remedy."""
    text = one_line(str(error)) or type(error).__name__
    if not text.startswith((f"{group}.", f"{group}=")):
        if isinstance(error, ValueError | OSError):
            return f"{group}: {text}"
        problem = f"cannot be made ({type(error).__name__}: {text})"
        return str(Mistake(f"{group}._target_", node["_target_"], problem, "correct the component or its keys"))
    if "; " in text:
        return text
    key = text.partition("=")[0]
    parameters = parameters_of(locate(node["_target_"]))
    default = parameters.defaults.get(key.removeprefix(f"{group}.")) if parameters is not None else None
    return f"{text}; give for example {key}={show(default)}" if default is not None else text


def _has_unresolved(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_unresolved(child) for child in value.values())
    if isinstance(value, list):
        return any(_has_unresolved(child) for child in value)
    return value is UNRESOLVED
