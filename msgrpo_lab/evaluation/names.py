"""What `policy=…` names: from the words of the command line to contenders, and one line for every word that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.config import conf_dir
from msgrpo_lab.config.choices import Found, options_of
from msgrpo_lab.evaluation.contender import Contender, Origin, PolicySpec
from msgrpo_lab.evaluation.policies import PLAYERS, ModelShelf, language_contender, player_contender, remote_contender
from msgrpo_lab.evaluation.trained import RunSource, Which, origin_of, read_checkpoint, read_weights, spec_of
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean, one_line

if TYPE_CHECKING:
    from mlflow.entities import Run

FORMS = "base, base:<model>, run:<id>[/best], sweep:<id|latest>, remote[:<model>], or a folder of trained weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Everything that a policy's name may refer to."""

    spec: PolicySpec
    """The command line's own model, prompt, engine and decoding rule."""
    model: str
    """Name of its model."""
    temperature: float | None
    """Of sampled decoding, if the command line gives one."""
    remote: Mapping[str, Any]
    """The engine of remote models."""
    shared: Mapping[str, Any]
    """Top-level keys (`seed`, `paths`) that a file of `conf/model` refers to."""
    runs: RunSource
    shelf: ModelShelf
    say: Callable[[str], None]
    """Takes remarks, for people."""

    def contenders(self, names: Sequence[str], found: Found) -> list[Contender]:
        """The contenders that the names stand for, each once; mistakes are added to `found`."""
        if not names:
            found.add([Mistake("policy", "[]", "no policy is named", f"give players or {FORMS}")])
        contenders: dict[str, Contender] = {}
        for name in dict.fromkeys(names):
            try:
                contenders |= {one.label: one for one in self._named(name)}
            except ValueError as error:
                text = one_line(str(error))
                found.add([text if text.startswith("policy=") else f"policy={name}: {text}"])
        return list(contenders.values())

    def _named(self, name: str) -> Iterator[Contender]:
        kind, colon, rest = name.partition(":")
        if name in PLAYERS:
            yield player_contender(name)
        elif name == "base":
            yield self._base(name, self.spec, self.model)
        elif kind == "base" and colon:
            yield self._base(name, self._other_model(rest), rest)
        elif name == "remote" or (kind == "remote" and colon):
            yield remote_contender(name, rest or None, self.remote, self.spec)
        elif kind == "run" and colon:
            run_id, which = _which(rest)
            yield self._of_run(self.runs.run(run_id), which)
        elif kind == "sweep" and colon:
            sweep, which = _which(rest)
            runs, unfinished = self.runs.sweep(sweep)
            if unfinished:
                self.say(f"policy={name}: {unfinished} of its runs have not finished and are left out")
            for run in runs:
                yield self._of_run(run, which)
        else:
            yield self._in_folder(name)

    def _base(self, label: str, spec: PolicySpec, model: str) -> Contender:
        _check_source(spec.model)
        if spec.model.get("adapter") is not None:
            raise ValueError("model.adapter is for training; the folder is a policy itself, give policy=<folder>")
        return language_contender(
            label=label,
            kind="base",
            spec=spec,
            weights=None,
            origin=Origin(model=model),
            view=None,
            shelf=self.shelf,
        )

    def _other_model(self, model: str) -> PolicySpec:
        options = options_of("model")
        if model not in options:
            known = ", ".join(closest_first(model, options))
            raise ValueError(f"no such model; {did_you_mean(model, options)}there are: {known}")
        merged = OmegaConf.create({**self.shared, "model": OmegaConf.load(conf_dir() / "model" / f"{model}.yaml")})
        tree = OmegaConf.to_container(merged, resolve=True)
        assert isinstance(tree, dict)
        return replace(self.spec, model=tree["model"])

    def _of_run(self, run: Run, which: Which) -> Contender:
        label = f"run:{run.info.run_id}" + ("" if which == "last" else f"/{which}")
        try:
            config = self.runs.config(run)
            weights = read_weights(self.runs.adapter(run, which))
            if weights is None:
                raise ValueError(f"run {run.info.run_id} has no trained weights under adapter/{which}")
            if weights.adapter is not None:
                _check_source(config["model"])
        except ValueError as error:
            raise ValueError(f"policy={label}: {error}") from error
        return language_contender(
            label=label,
            kind="run",
            spec=spec_of(config, engine=self.spec.engine, temperature=self.temperature),
            weights=weights,
            origin=origin_of(run),
            view=config["env"].get("observation"),
            shelf=self.shelf,
        )

    def _in_folder(self, name: str) -> Contender:
        folder = Path(name).expanduser()
        checkpoint = read_checkpoint(folder)
        if checkpoint is not None:
            _check_source(checkpoint.config["model"])
            return language_contender(
                label=name,
                kind="checkpoint",
                spec=spec_of(checkpoint.config, engine=self.spec.engine, temperature=self.temperature),
                weights=checkpoint,
                origin=checkpoint.origin,
                view=checkpoint.config["env"].get("observation"),
                shelf=self.shelf,
            )
        weights = read_weights(folder) if folder.is_dir() else None
        if weights is None:
            if folder.is_dir():
                remedy = "give a folder that training has written, such as …/adapter/last"
                raise ValueError(f"this folder holds no trained weights; {remedy}")
            players = ", ".join(closest_first(name, PLAYERS))
            raise ValueError(f"no such policy; {did_you_mean(name, [*PLAYERS, 'base'])}give {players}, {FORMS}")
        if weights.adapter is not None:
            weights.adapter.check_base(self.spec.model)
            _check_source(self.spec.model)
        return language_contender(
            label=name,
            kind="adapter",
            spec=self.spec,
            weights=weights,
            origin=Origin(model=self.model),
            view=None,
            shelf=self.shelf,
        )


def _which(text: str) -> tuple[str, Which]:
    """`<id>` or `<id>/best`.

    Raises:
        ValueError: something else stands behind the id.
    """
    name, slash, which = text.partition("/")
    if slash and which not in ("last", "best"):
        raise ValueError(
            f"{which} is neither last nor best; give run:<id> for the last policy, run:<id>/best for the best"
        )
    return name, "best" if which == "best" else "last"


def _check_source(model: Mapping[str, Any]) -> None:
    """Asks a model's source whether it can be had, before anything is loaded.

    Raises:
        ValueError: it cannot.
    """
    if model.get("path") is not None:
        return
    try:
        source = instantiate(dict(model["source"]))
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error
    if callable(check := getattr(source, "check", None)):
        check()
