"""Wrong command lines of every command: one clear line for each mistake, before a model is loaded, and nothing left.

Each is run in this process through the command's own `main`, with every way of reading or making weights taken away; a
handful are real processes against the clock.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
import transformers

from msgrpo_lab import compare, evaluate, train
from msgrpo_lab import difficulty as oracle

ROOT = Path(__file__).parents[2]
SECONDS = 10.0
COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "train": train.main,
    "oracle": oracle.main,
    "compare": compare.main,
    "evaluate": evaluate.main,
}
MODULES = {"train": "msgrpo_lab.train", "oracle": "msgrpo_lab.oracle", "compare": "msgrpo_lab.compare"}

# A command line, and how each of the lines begins that it must be answered with.
WRONG: list[tuple[str, list[str]]] = [
    # overrides
    ("train ckpt_path=run:abc", ["ckpt_path=run:abc: there is no such run"]),
    ("train sampler=absadv", ["sampler=absadv: no such option; did you mean 'abs_adv'?"]),
    ("train env=null", ["env=null: a group takes the name of one option"]),
    ("train env=[frozenlake,snake]", ["env=[frozenlake,snake]: one option must be chosen; there are: frozenlake"]),
    ("train env.horzion=3", ["env.horzion=3: no such key; did you mean 'horizon'?"]),
    ("train foo=1", ["foo=1: no such key; the nearest keys are"]),
    ("train +foo=1", ["foo=1: no such key; the nearest keys are"]),
    ("train ++rolout.num_groups=1", ["rolout.num_groups=1: no such key; did you mean 'rollout'?"]),
    ("train +rollout.foo=1", ["rollout.foo=1: no such key"]),
    ("train ~rollout", ["~rollout: the job needs it; leave ~rollout out"]),
    ("train ~env", ["~env: the job needs it; leave ~env out"]),
    ("train ~update.token_budget", ["~update.token_budget: this key cannot be left out; give it a value"]),
    ("train seed", ["seed: has no value; write seed=…"]),
    ("train =3", ["=3: the key is missing; write key=value"]),
    ("train ''", ["'': the key is missing; write key=value"]),
    ("train seed=1,2", ["seed=1,2: several values are a sweep; add -m"]),
    ("train seed=[1", ["seed=[1: cannot be read"]),
    ("train --nosuch", ["command line: unrecognized arguments: --nosuch; --hydra-help lists"]),
    ("train -m seed=0,-1", ["seed=-1: must be a whole number at least 0; give for example seed=0"]),
    # plain values
    ("train seed=1.5", ["seed=1.5: must be a whole number at least 0; give for example seed=0"]),
    ("train seed='${nosuch}'", ["seed=${nosuch}: cannot be resolved"]),
    ("train seed=99999999999999999999", ["seed=99999999999999999999: must be at most 9223372036854775807; give"]),
    ("train rollout.num_groups=0", ["rollout.num_groups=0: must be a whole number at least 1; give"]),
    ("train rollout.num_groups=1.5", ["rollout.num_groups=1.5: must be a whole number at least 1; give"]),
    ("train rollout.num_groups=null", ["rollout.num_groups=null: must be a whole number at least 1; give"]),
    ("train rollout.group_size=1", ["rollout.group_size=1: must be a whole number at least 2; give"]),
    ("train rollout.sampling.temperature=0", ["rollout.sampling.temperature=0.0: must be a number at least 0.0001; "]),
    ("train rollout.sampling.temperature=inf", ["rollout.sampling.temperature=inf: must be a number"]),
    ("train rollout.sampling.top_k=0", ["rollout.sampling.top_k=0: must be a whole number at least 1 or null; give"]),
    ("train rollout.sampling.top_p=1.1", ["rollout.sampling.top_p=1.1: must be a number in (0, 1] or null; give"]),
    ("train rollout.sampling.max_new_tokens=0", ["rollout.sampling.max_new_tokens=0: must be a whole number at least"]),
    ("train rollout.sampling.constrain=maybe", ["rollout.sampling.constrain=maybe: must be true or false; give"]),
    ("train update.minibatches=5000", ["update.minibatches=5000: there are only 512 episodes"]),
    ("train update.token_budget=0", ["update.token_budget=0: must be a whole number at least 1; give"]),
    ("train update.max_grad_norm=-1", ["update.max_grad_norm=-1.0: must be a number greater than 0 or null; give"]),
    ("train update.sharing=some", ["update.sharing=some: must be one of tree, none; give"]),
    ("train paths=3", ["paths=3: must be a section of keys; give paths.root=…"]),
    ("train paths.cache=", ["paths.cache=: must not be empty; give a folder"]),
    ("train paths.outputs=/dev/null/x", ["paths.outputs=/dev/null/x: this folder cannot be written"]),
    ("train hydra.run.dir=/dev/null/x", ["hydra.run.dir=/dev/null/x: cannot be written"]),
    ("train -m launcher=joblib hydra.launcher.n_jobs=0", ["hydra.launcher.n_jobs=0: there must be a job at a time"]),
    # games
    ("train env.horizon=0", ["env.horizon=0: must be at least 1; give for example env.horizon="]),
    ("train env.size=100", ["env.size=100: must be at least 2 and at most 16; give"]),
    ("train env.frozen_probability=nan", ["env.frozen_probability=nan: must be a number, not nan; give"]),
    ("train env.observation=full", ["env.observation=full: must be one of compact, relative, paper; give"]),
    ("train env.invalid_penalty=1e308", ["env.invalid_penalty=1e+308: must be at most 1e+06 in size; give"]),
    ("train env=snake env.num_apples=500", ["env.size=10: too small for 502 items and snakes; make it larger"]),
    # what is trained, and how
    ("train sampler.num_episodes=0", ["sampler.num_episodes=0: must be at least 1; set"]),
    ("train sampler.num_episodes=9999", ["sampler.num_episodes=9999: the rollout collects only 64 groups of 16"]),
    ("train sampler=abs_adv sampler.alpha=-1", ["sampler.alpha=-1: must be finite and at least 0; 1 is"]),
    ("train credit=mt_grpo credit.turn_weight=1e308", ["credit.turn_weight=1e+308: must lie in [0, 1e+06]; 1 is"]),
    ("train credit=discounted_step credit.gamma=2", ["credit.gamma=2: must lie in [0, 1]; 1 is the undiscounted"]),
    ("train credit=exact env=snake", ["credit=exact: it reads exact values, and env=snake has no oracle; use"]),
    ("train loss.beta=-1", ["loss.beta=-1: must lie in [0, 1e+06]; 0 turns it off"]),
    ("train loss=dr_grpo loss.constant=0", ["loss.constant=0: loss.reduction=dr_grpo needs a positive number of tok"]),
    ("train optim.lr=1e308", ["optim.lr=1e+308: must be above 0 and at most 1; 3e-4 is usual"]),
    ("train optim.betas=[0.9]", ["optim.betas=[0.9]: must be a list of a number and a number"]),
    ("train engine=scripted", ["engine=scripted: its answers are not the policy's and cannot train it; use engine=hf"]),
    (
        "train prompt=think_plan_action sampling=constrained",
        ["rollout.sampling.constrain=true: the prompt asks for an <action> tag"],
    ),
    ("train prompt.user=hello", ["prompt.user='hello': must show the state; write {observation}"]),
    ("train 'prompt.stop=[\"\"]'", ["prompt.stop=['']: an empty text would end every answer at once; leave"]),
    ("train 'prompt.user=\"{observaton}\"'", ["prompt.user='{observaton}': "]),
    ("train 'prompt.system=\"{rule}\"'", ["prompt.system='{rule}': "]),
    (
        "train model=tiny prompt.examples=[[ice,jump]]",
        ["prompt.examples[0]=jump: the prompt's parser reads no action in it"],
    ),
    (
        "train model=tiny prompt=think_action rollout.sampling.constrain=false 'prompt.examples=[[ice,left]]'",
        ["prompt.examples[0]=left: the prompt's parser reads no action in it"],
    ),
    ("train model=tiny rollout.sampling.top_k=5000", ["rollout.sampling.top_k=5000: the model's vocabulary has only"]),
    (
        "train prompt.stop=[.]",
        ["prompt.stop=[.]: the prompt's parser ends an answer at its first legal word by itself"],
    ),
    # the trainer
    ("train trainer.max_epochs=0", ["trainer.max_epochs=0: must be a whole number at least 1"]),
    ("train trainer.devices=x", ["trainer.devices=x: there is nothing to train on; set trainer.devices=1"]),
    ("train trainer.devices=2", ["trainer.devices=2: training over several devices is not built"]),
    ("train trainer.accelerator=gpuu", ["trainer.accelerator=gpuu: Lightning has no such accelerator; give"]),
    ("train +trainer.max_steps=3", ["trainer.max_steps=3: a run is as long as trainer.max_epochs; set"]),
    ("train +trainer.gradient_clip_val=1", ["trainer.gradient_clip_val=1: the module takes its optimiser steps it"]),
    ("train +trainer.precision=16", ["trainer.precision=16: the model's own precision is used; set model.precision"]),
    ("train trainer.log_every_n_steps=0", ["trainer.log_every_n_steps=0: must be at least 1, or nothing would be"]),
    # the model
    ("train model=gpt", ["model=gpt: no such option; there are: "]),
    ("train model.path=/no/such", ["model.path=/no/such: there is nothing at /no/such; give"]),
    ("train model.precision=float16", ["model.precision=float16: must be one of auto, float32, bfloat16; give"]),
    ("train model.lora_rank=0", ["model.lora_rank=0: must be at least 1; null trains all weights; give"]),
    (
        "train model=tiny model.lora_rank=4 model.lora_targets=[nosuch]",
        ["model.lora_targets=[nosuch]: the model has"],
    ),
    (
        "train model=tiny model.lora_rank=4 model.lora_targets=q_proj",
        ["model.lora_targets=q_proj: a text is a"],
    ),
    (
        "train model=tiny model.lora_rank=4 model.lora_targets=[lm_head]",
        ["model.lora_targets=[lm_head]: the model"],
    ),
    ("train model=tiny model.lora_rank=9999", ["model.lora_rank=9999: the model's matrices are only 128 wide"]),
    ("train model=tiny update.token_budget=20", ["update.token_budget=20: the longest row has "]),
    (
        "train model=tiny rollout.sampling.constrain=false rollout.sampling.max_new_tokens=3000",
        ["rollout.sampling.max_new_tokens=3000: with a prompt of "],
    ),
    ("train model.seed=-1", ["model.seed=-1: must be at least 0; give"]),
    ("train model=tiny model.source.hidden_size=100", ["model.source.hidden_size=100: must be an even multiple of"]),
    # what watches, and where it is kept
    ("train +callbacks.foo=3", ["callbacks.foo=3: must be a Lightning callback; give"]),
    ("train +callbacks.foo._target_=builtins.print", ["callbacks.foo._target_=builtins.print: is not a Lightning"]),
    ("train callbacks.fidelity.rules=[nosuch]", ["callbacks.fidelity.rules=[nosuch]: credit=nosuch: no such option"]),
    ("train evaluation.temperature=0", ["evaluation.temperature=0: must be above 0; greedy"]),
    ("train logger.tracking_uri=ftp://x", ["logger.tracking_uri=ftp://x: the address is of an unknown scheme; give"]),
    ("train logger.tracking_uri=http://127.0.0.1:1", ["logger.tracking_uri=http://127.0.0.1:1: no server answers"]),
    ("train logger.tracking_uri=http://u:planted@host", ["logger.tracking_uri=***: a secret would be kept"]),
    ("train +engine.api_key=planted", ["engine.api_key=***: HFEngine has no such key"]),
    # several at once
    (
        "train seed=-1 env.horizon=0 optim.lr=0 foo=1 trainer.max_epochs=0",
        ["foo=1: ", "seed=-1: ", "trainer.max_epochs=0: ", "env.horizon=0: ", "optim.lr=0: "],
    ),
    # other commands
    ("oracle num_maps=0", ["num_maps=0: must be a whole number at least 1; give"]),
    ("oracle env=nosuch", ["env=nosuch: no such option; there are: "]),
    ("oracle env.horizon=0 output=", ["env.horizon=0: must be at least 1; give", "output=: must not be empty; give"]),
    ("oracle -m env=snake,frozenlake", ["command line: one scenario a call; leave out -m"]),
    ("compare", ["rollouts=???: a value is missing; give a saved rollout"]),
    ("compare rollouts=/no/such", ["rollouts=/no/such: there is no such file; give a file"]),
    (
        "compare rollouts=x credit=nosuch draws=1",
        ["draws=1: must be a whole number at least 2; ", "credit=nosuch: no s"],
    ),
    ("compare rollouts=x seed=1.5", ["seed=1.5: must be a whole number in [0, 9223372036854775807]; give"]),
    ("compare rollouts=x paths=3", ["paths=3: must be a section of keys; give paths.outputs=…"]),
    ("compare rollouts=x paths.outputs=", ["paths.outputs=: must not be empty; give a folder"]),
    ("compare rollouts=x paths.outputs=null", ["paths.outputs=null: must be text; give a folder"]),
    ("compare rollouts=x paths.nosuch=1", ["paths.nosuch=1: no such key; "]),
    ("compare 'rollouts=${nosuch}'", ["rollouts=${nosuch}: cannot be resolved (Interpolation key 'nosuch' not found"]),
    ("compare rollouts=x credit=all,nosuch", ["credit=nosuch: no such option; there are: "]),
    ("compare rollouts=x credit=rloo credit.gigpo.gamma=1", ["credit.gigpo.gamma=1: gigpo is not among the chosen; "]),
    ("evaluate policy=nosuch", ["policy=nosuch"]),
    ("evaluate policy=random scenario=nosuch", ["scenario=nosuch"]),
    ("evaluate policy=random episodes=0", ["episodes=0: "]),
]


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Takes every way to weights away, and works in an empty folder."""

    def refused(*arguments: object, **named: object) -> None:
        raise AssertionError("weights were asked for")

    for owner, name in (
        (transformers.AutoModelForCausalLM, "from_pretrained"),
        (torch, "load"),
        (safetensors, "safe_open"),
    ):
        monkeypatch.setattr(owner, name, refused)
    made = torch.nn.Linear.__init__

    def without_storage(layer: torch.nn.Linear, *arguments: object, **named: object) -> None:
        assert torch.get_default_device().type == "meta", "weights were made"
        made(layer, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.Linear, "__init__", without_storage)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSGRPO_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command"])


def test_there_are_enough() -> None:
    assert len({line for line, _ in WRONG}) >= 60


@pytest.mark.parametrize(("line", "beginnings"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_told_at_once(
    line: str, beginnings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *arguments = shlex.split(line)
    start = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command](arguments)
    assert time.process_time() - start < SECONDS
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    told = [text.removeprefix("msgrpo_lab: ") for text in printed.err.splitlines()]
    assert len(told) == len(beginnings), told
    for text, beginning in zip(told, beginnings, strict=True):
        assert text.startswith(beginning)
        assert "; " in text, "a remedy follows"
        assert "planted" not in text
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    "line",
    [
        "train sampler=nosuch",
        "train seed=1.5 env.horizon=0",
        "oracle num_maps=0",
        "compare rollouts=x credit=nosuch",
    ],
)
def test_a_real_process_ends_within_ten_seconds(line: str, tmp_path: Path) -> None:
    command, *arguments = shlex.split(line)
    start = os.times()
    done = subprocess.run(
        [sys.executable, "-m", MODULES[command], *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    end = os.times()
    assert done.returncode == 2
    assert done.stdout == ""
    assert all(text.startswith("msgrpo_lab: ") for text in done.stderr.splitlines())
    # Processor seconds: how long it is to a user on an idle machine.
    spent = end.children_user + end.children_system - start.children_user - start.children_system
    assert spent < SECONDS
    assert list(tmp_path.iterdir()) == []
