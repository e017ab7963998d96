"""Policy gradients in action-logit space, one row an episode or a group, and how they point in resampled batches.

The gradient that advantages induce is that of `oracle.lake_values.induced_gradient`, kept apart by episode, so that any
batch drawn from the same episodes is a sum of rows.

Axes: E episodes, G groups, N played turns, X texts, B answers, D = X·B logits, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from msgrpo_lab.decoder.plan import Sharing
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.fidelity.truth import LakeTruth
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.oracle.lake_values import PolicyValues, TextIndex, state_gradient
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Credit, RolloutBatch, Sampling, TrainBatch


def score_matrix(
    text_N: Int[np.ndarray, " N"], answer_N: Int[np.ndarray, " N"], prob_XB: Float[np.ndarray, "X B"]
) -> sparse.csr_array:
    """∂ log π(b_n|x_n)/∂logit, `[N, D]`: 1[b = b_n] − π(b|x_n) in row x_n of the logits."""
    texts, answers = prob_XB.shape
    score_NB = -prob_XB[text_N]
    score_NB[np.arange(len(text_N)), answer_N] += 1.0
    column_NB = text_N[:, None] * answers + np.arange(answers)
    ends = np.arange(len(text_N) + 1) * answers
    return sparse.csr_array((score_NB.ravel(), column_NB.ravel(), ends), shape=(len(text_N), texts * answers))


def episode_gradients(
    adv_N: Float[np.ndarray, " N"], num_turns_E: Int[np.ndarray, " E"], score_ND: sparse.csr_array
) -> sparse.csr_array:
    """Σ_t adv_{i,t} ∇ log π(b_{i,t}|x_{i,t}) of each episode, `[E, D]`; turns in order of episode and time."""
    ends = np.concatenate([[0], np.cumsum(num_turns_E)])
    adv_EN = sparse.csr_array((adv_N, np.arange(len(adv_N)), ends), shape=(len(num_turns_E), len(adv_N)))
    return sparse.csr_array(adv_EN @ score_ND)


def group_sums(
    gradient_ED: sparse.csr_array, group_E: Int[np.ndarray, " E"], weight_E: Float[np.ndarray, " E"], groups: int
) -> sparse.csr_array:
    """Σ_{i in g} weight_i gradient_i, `[G, D]`."""
    shape = (groups, len(group_E))
    return sparse.csr_array(sparse.csr_array((weight_E, (group_E, np.arange(len(group_E)))), shape=shape) @ gradient_ED)


def map_gradients(values: PolicyValues, texts: TextIndex) -> sparse.csr_array:
    """∂J_m/∂logit of each map by itself, `[M, D]`: `exact_gradient` is their weighted sum."""
    gradient_MSB = state_gradient(values)
    maps, _, answers = gradient_MSB.shape
    taken_MS = texts.text_MS < len(texts.texts)
    map_Q, _ = np.nonzero(taken_MS)
    column_QB = texts.text_MS[taken_MS][:, None] * answers + np.arange(answers)
    entries = (gradient_MSB[taken_MS].ravel(), (np.repeat(map_Q, answers), column_QB.ravel()))
    return sparse.csr_array(entries, shape=(maps, len(texts.texts) * answers))


def cosine(first_RD: Float[np.ndarray, "R D"], second_RD: Float[np.ndarray, "R D"]) -> Float[np.ndarray, " R"]:
    """Cosine of the angle between two gradients, row by row; nan where one of them is 0."""
    inner_R = np.einsum("rd,rd->r", first_RD, second_RD)
    norm_R = np.sqrt(np.einsum("rd,rd->r", first_RD, first_RD) * np.einsum("rd,rd->r", second_RD, second_RD))
    return np.where(norm_R > 0, np.clip(inner_R / np.where(norm_R > 0, norm_R, 1.0), -1.0, 1.0), np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParameterSpace:
    """A policy's trainable parameters, seen from its action logits.

    The policy must be as it was when it sampled, and decoding constrained to the legal words.

    Raises:
        ValueError: decoding is free, so that an action's probability is no sum over a few words.
    """

    policy: LanguagePolicy
    prompt: PromptBuilder
    game: TextGame
    sampling: Sampling
    token_budget: int = 8192
    """Padded tokens of one forward pass at most."""
    sharing: Sharing = "tree"

    def __post_init__(self) -> None:
        """Refuses free decoding."""
        if self.sampling.choices is None:
            raise ValueError(
                "rollout.sampling.constrain=false: gradients in parameter space need answers constrained to the legal "
                "words; set it to true, or measure in logit space alone"
            )

    def gradient(self, texts: tuple[str, ...], gradient_XB: Float[np.ndarray, "X B"]) -> Float[np.ndarray, " P"]:
        """Σ_{x,b} g(x, b) ∇_θ log π_θ(b|x) over the trainable parameters; the parameters' own `.grad` is left alone.

        Raises:
            ValueError: two words mean the same answer, or an answer that no word means has a gradient.
        """
        parameters = list(self.policy.trainable_parameters())
        total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        batch = self._batch(texts, gradient_XB).to(self.policy.device)
        trie = choice_trie(self.sampling.choices or ())
        for plan in self.policy.plan(batch, trie, self.token_budget, self.sharing) if len(batch.input_ids) else ():
            stats = self.policy.token_stats(plan, trie, self.sampling)
            weight = batch.advantage[torch.from_numpy(plan.samples).to(self.policy.device)].to(stats.logprobs)
            objective = (weight * stats.logprobs.sum(dim=1)).sum()
            found = torch.autograd.grad(objective, parameters, allow_unused=True)
            for so_far, part in zip(total, found, strict=True):
                if part is not None:
                    so_far.add_(part)
        return torch.cat([part.flatten() for part in total]).cpu().numpy()

    def cosine(self, truth: LakeTruth, batch: RolloutBatch, credit: Credit) -> float:
        """Cosine, in parameter space, between the gradient that a rule's credit induces and the exact one."""
        induced_P, exact_P = (
            self.gradient(truth.texts.texts, gradient_XB)
            for gradient_XB in (truth.induced(batch, credit.turn_adv), truth.gradient(batch))
        )
        norm = float(np.linalg.norm(induced_P) * np.linalg.norm(exact_P))
        return float(np.clip(induced_P @ exact_P / norm, -1.0, 1.0)) if norm > 0 else float("nan")

    def _batch(self, texts: tuple[str, ...], gradient_XB: Float[np.ndarray, "X B"]) -> TrainBatch:
        """One row for each text and word with a gradient: the prompt, the word, and g(x, b) as its advantage."""
        choice_of = self._choice_of()
        silent = [b for b in range(gradient_XB.shape[1]) if b not in choice_of and np.abs(gradient_XB[:, b]).max() > 0]
        if silent:
            raise ValueError(f"gradient_XB: answer {silent[0]} has a gradient, but no legal word means it")
        prompts = [self.prompt.render(self.game.rules, text, self.game.legal_actions) for text in texts]
        pairs = [(x, b) for x, b in np.argwhere(gradient_XB != 0).tolist()]
        rows = [(prompts[x], choice_of[b], float(gradient_XB[x, b])) for x, b in pairs]
        width = max((len(prompt) + len(choice) for prompt, choice, _ in rows), default=1)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        read, written = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
        for row, (prompt, choice, _) in enumerate(rows):
            end = len(prompt) + len(choice)
            input_ids[row, :end] = torch.from_numpy(np.concatenate([prompt, choice]))
            read[row, :end] = True
            written[row, len(prompt) : end] = True
        ones = torch.ones(len(rows), dtype=torch.long)
        return TrainBatch(
            input_ids=input_ids,
            attention_mask=read,
            completion_mask=written,
            old_logprobs=torch.zeros(len(rows), width),
            ref_logprobs=None,
            advantage=torch.tensor([weight for _, _, weight in rows], dtype=torch.float64),
            weight=ones.double(),
            num_turns=ones,
            episode=torch.arange(len(rows)),
            turn=torch.zeros_like(ones),
            num_episodes=len(rows),
            num_tokens=int(written.sum()),
        )

    def _choice_of(self) -> dict[int, tuple[int, ...]]:
        """Tokens of the word that means each answer."""
        choice_of: dict[int, tuple[int, ...]] = {}
        for choice in self.sampling.choices or ():
            word = self.policy.tokenizer.decode(list(choice), skip_special_tokens=True)
            action = self.prompt.parse(word, self.game.legal_actions).action
            answer = len(self.game.legal_actions) if action is None else action
            if answer in choice_of:
                raise ValueError(
                    f"choices: two words mean answer {answer}, one of them {word!r}; give each action one word"
                )
            choice_of[answer] = choice
        return choice_of
