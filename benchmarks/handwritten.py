"""A plain loop on transformers and PEFT, as a competent user writes it in an afternoon: what the lab is compared with.

Of the lab it uses the game and the prompt only. It does what is commonly known to be fast: all live episodes in one
`model.generate` call a turn with left padding and a key-value cache, bf16 where the lab has it, micro-batches sorted by
length, the output projection at completion positions only. It does not share work between equal prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from benchmarks.peer_job import PeerJob, PeerResult, advantages
from msgrpo_lab.tsmg.base import TextGame


@dataclass(slots=True)
class _Play:
    """An episode in play."""

    game: TextGame
    observation: str
    ret: float = 0.0
    steps: list[tuple[Int[np.ndarray, " P"], list[int]]] = field(default_factory=list)
    """Prompt and completion of each turn."""


@dataclass(frozen=True, slots=True)
class _Step:
    prompt: Int[np.ndarray, " P"]
    completion: list[int]
    weight: float
    """Advantage / (turns of the episode × episodes)."""


def cut(row: list[int], ends: Set[int], stops: Sequence[str], decode: Callable[[list[int]], str]) -> list[int]:
    """A completion up to its end token or stop text; behind it stands what other rows of the batch waited for."""
    for length in range(1, len(row) + 1):
        if row[length - 1] in ends or any(stop in decode(row[:length]) for stop in stops):
            return row[:length]
    return row


class HandWritten:
    """The loop, with a model of its own.

    Args:
        job: the iteration.
        micro_batch: rows of one forward and backward pass.
    """

    def __init__(self, job: PeerJob, micro_batch: int = 16) -> None:
        from peft import get_peft_model

        self.job, self.micro_batch = job, micro_batch
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = job.load()
        self.tokenizer: Any = loaded.tokenizer
        base: Any = loaded.model.to(device)
        lora = job.lora()
        self.model: Any = base if lora is None else get_peft_model(base, lora)
        self.base: Any = base
        self.device = device
        self.pad = int(self.tokenizer.pad_token_id)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optim = job.config.optim
        self.optimizer = torch.optim.AdamW(self.trained, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)
        self.model.eval()  # no dropout in these models; eval as the lab does

    def iterate(self, seed: int, repetition: int, *, groups: int, group_size: int) -> PeerResult:
        """One rollout and one optimiser step over all of its steps."""
        started = time.perf_counter()
        plays = self.rollout(seed, groups=groups, group_size=group_size)
        rolled = time.perf_counter()
        loss = self.update(plays, group_size)
        ended = time.perf_counter()
        return PeerResult(
            peer="handwritten",
            repetition=repetition,
            env_steps=sum(len(play.steps) for play in plays),
            rollout_s=rolled - started,
            update_s=ended - rolled,
            total_s=ended - started,
            generated_tokens=sum(len(completion) for play in plays for _, completion in play.steps),
            loss=loss,
        )

    def rollout(self, seed: int, *, groups: int, group_size: int) -> list[_Play]:
        """Plays every episode to its end, all live ones together."""
        env_seeds, members = self.job.seeds(seed)
        plays = []
        for number, member in enumerate(members[: groups * group_size]):
            game = self.job.make_game()
            observation, _ = game.reset(seed=env_seeds[number // group_size], options={"member": member})
            plays.append(_Play(game, observation))
        live = plays
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # `generate` draws from torch's own generator
            while live:
                live = self._turn(live)
        return plays

    def _turn(self, live: Sequence[_Play]) -> list[_Play]:
        render, parse = self.job.prompt.render, self.job.prompt.parse
        prompts = [render(p.game.rules, p.observation, p.game.legal_actions) for p in live]
        going_on = []
        for play, prompt, completion in zip(live, prompts, self.generate(prompts), strict=True):
            text = self.tokenizer.decode(completion, skip_special_tokens=True)
            action = parse(text, play.game.legal_actions).action
            play.observation, reward, terminated, truncated, _ = play.game.step(action)
            play.ret += float(reward)
            play.steps.append((prompt, completion))
            if not (terminated or truncated):
                going_on.append(play)
        return going_on

    @torch.no_grad()
    def generate(self, prompts: Sequence[Int[np.ndarray, " P"]]) -> list[list[int]]:
        """One sampled completion a prompt, cut behind its end-of-turn token or stop text."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.copy())
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        sampling = self.job.config.rollout.sampling
        stops = list(self.job.prompt.template.stop)
        with self._autocast():
            written = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p or 1.0,
                max_new_tokens=self.job.max_new_tokens,
                pad_token_id=self.pad,
                use_cache=True,
                stop_strings=stops or None,
                tokenizer=self.tokenizer,
                prefix_allowed_tokens_fn=self._allowed(longest),
            )
        ends = set(self._ends())
        return [cut(row, ends, stops, self.tokenizer.decode) for row in written[:, longest:].tolist()]

    def _ends(self) -> list[int]:
        configured = self.base.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return [int(token) for token in (*listed, self.tokenizer.eos_token_id) if token is not None]

    def _allowed(self, prompt_length: int) -> Callable[[int, torch.Tensor], list[int]] | None:
        """Which tokens may come next where decoding is constrained to the legal words."""
        choices = self.job.choices
        if choices is None:
            return None

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            so_far = tuple(ids[prompt_length:].tolist())
            following = [choice[len(so_far)] for choice in choices if choice[: len(so_far)] == so_far != choice]
            return following or [int(self.tokenizer.eos_token_id)]

        return allowed

    def update(self, plays: Sequence[_Play], group_size: int) -> float:
        """One AdamW step on the clipped objective's gradient (ratio 1: one pass), summed over micro-batches."""
        steps = [
            _Step(prompt, completion, advantage / (len(play.steps) * len(plays)))
            for play, advantage in zip(plays, advantages([play.ret for play in plays], group_size), strict=True)
            for prompt, completion in play.steps
        ]
        steps.sort(key=lambda step: len(step.prompt) + len(step.completion))
        self.optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(steps), self.micro_batch):
            loss = self.loss(steps[start : start + self.micro_batch])
            torch.autograd.backward(loss)
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.trained, self.job.max_grad_norm)
        self.optimizer.step()
        return total

    def loss(self, steps: Sequence[_Step]) -> torch.Tensor:
        """−Σ weight · mean over the completion's tokens of π/π_old, with π_old = π."""
        rows = [[*step.prompt.tolist(), *step.completion] for step in steps]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        row_of = [index for index, step in enumerate(steps) for _ in step.completion]
        column = [len(step.prompt) - 1 + place for step in steps for place in range(len(step.completion))]
        targets = torch.tensor([token for step in steps for token in step.completion], device=self.device)
        weight = torch.tensor([s.weight / len(s.completion) for s in steps for _ in s.completion], device=self.device)
        with self._autocast():
            hidden = self.base.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            logits = self.base.get_output_embeddings()(hidden.last_hidden_state[row_of, column])
        logits = logits.float() / self.job.config.rollout.sampling.temperature
        logprobs: torch.Tensor = logits.log_softmax(dim=-1).gather(-1, targets[:, None]).squeeze(-1)
        objective: torch.Tensor = (weight * (logprobs - logprobs.detach()).exp()).sum()
        return -objective

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.job.dtype, enabled=self.job.dtype != torch.float32)
