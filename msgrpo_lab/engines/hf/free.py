"""Free decoding, token by token, with every distinct text continued once.

Under one policy version the texts behind each prompt form a tree. A node is a text whose last token has been read: it
knows from which distribution the next token is drawn. Completions walk down the tree by their own uniform numbers and
wait where a node is missing; when all wait, the missing nodes are read in one call. So a text that was written in an
earlier turn, or by another episode, costs nothing again, and a step's cost is its distinct new tokens.

A call reads the weights whatever it is for, and with few texts that is most of its cost. So it also reads ahead: behind
each missing node, the continuations that are likely by what was written so far under the same policy version, at this
prompt or at others. What is read ahead is never drawn; it is a node like any other, which a completion may come to.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from msgrpo_lab.decoder.decoding import decoding_logprobs, draw, top_logits
from msgrpo_lab.engines.base import Settled
from msgrpo_lab.engines.hf.constrained import distinct_prompts
from msgrpo_lab.engines.hf.prompts import PromptReader, Text, TextPool
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.types import Completion, Sampling

MEMORY = 100_000
"""Decoded texts remembered at most."""

Word = tuple[int, ...]
"""Tokens of a completion."""


class DecodedTexts:
    """Decodes every distinct sequence of tokens once."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self._tokenizer = policy.tokenizer
        self._ends = policy.end_token_ids
        self._texts: dict[Word, str] = {}

    def text(self, word: Word) -> str:
        """Decoded, without special tokens."""
        text = self._texts.get(word)
        if text is None:
            if len(self._texts) >= MEMORY:
                self._texts.clear()
            text = self._texts[word] = self._tokenizer.decode(list(word), skip_special_tokens=True)
        return text

    def is_over(self, word: Word, sampling: Sampling, settled: Settled | None) -> bool:
        """Whether a completion ends with these tokens."""
        if word[-1] in self._ends:
            return True
        if not sampling.stop and settled is None:
            return False
        text = self.text(word)
        return any(stop in text for stop in sampling.stop) or (settled is not None and settled(text))


@dataclass(slots=True)
class Written:
    """What N completions of at most C tokens consist of so far."""

    tokens: Int[np.ndarray, "N C"]
    logprobs: Float[np.ndarray, "N C"]
    lengths: Int[np.ndarray, " N"]
    stopped: Bool[np.ndarray, " N"]

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Written:
        """Before the first token."""
        return cls(
            tokens=np.full(shape, -1, dtype=np.int64),
            logprobs=np.zeros(shape, dtype=np.float32),
            lengths=np.zeros(shape[0], dtype=np.int64),
            stopped=np.zeros(shape[0], dtype=bool),
        )

    def completions(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        prompt_of: Int[np.ndarray, " N"],
        words: DecodedTexts,
        version: int,
    ) -> list[Completion]:
        """One each; equal completions of one prompt are one object."""
        made: dict[tuple[int, Word], Completion] = {}
        completions = []
        for row, (prompt, length) in enumerate(zip(prompt_of.tolist(), self.lengths.tolist(), strict=True)):
            word = tuple(self.tokens[row, :length].tolist())
            if (prompt, word) not in made:
                made[prompt, word] = Completion(
                    prompt_ids=prompts[prompt],
                    token_ids=self.tokens[row, :length].copy(),
                    logprobs=self.logprobs[row, :length].copy(),
                    text=words.text(word),
                    finish_reason="stop" if self.stopped[row] else "length",
                    policy_version=version,
                )
            completions.append(made[prompt, word])
        return completions


BLOCK = 512
"""Tokens of a block."""


def draw_grouped(
    logprobs: Float[torch.Tensor, "D V"],
    text_of: Int[np.ndarray, " N"],
    uniforms: Float[np.ndarray, " N"],
    greedy: bool,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """One token a draw, and its log-probability (nats). The result is the only thing copied to the host.

    Args:
        logprobs: distribution of each distinct text's next token; −inf where a token is never drawn.
        text_of: which text each draw continues.
        uniforms: in [0, 1), one a draw.
        greedy: take the mode (the first of equals) instead of drawing.
    """
    text = torch.from_numpy(text_of).to(logprobs.device)
    if greedy:
        token = logprobs.argmax(dim=-1)[text]
    else:
        uniform = torch.from_numpy(uniforms).to(logprobs.device)
        token = _invert(logprobs, text, uniform)
    drawn = torch.stack((token.double(), logprobs[text, token].double())).cpu().numpy()
    return drawn[0].astype(np.int64), drawn[1].astype(np.float32)


def _invert(
    logprobs: Float[torch.Tensor, "D V"], text: Int[torch.Tensor, " N"], uniform: Float[torch.Tensor, " N"]
) -> Int[torch.Tensor, " N"]:
    blocks = -(-logprobs.shape[1] // BLOCK)
    mass, missing = logprobs.exp(), blocks * BLOCK - logprobs.shape[1]
    if missing:
        mass = torch.nn.functional.pad(mass, (0, missing))
    mass_DBK = mass.view(len(mass), blocks, BLOCK)
    block_mass = mass_DBK.sum(dim=-1, dtype=torch.float64)[text]
    block_reached = _cumulate(block_mass)
    # The total may fall short of 1 by rounding: scale the draw.
    wanted = uniform * block_reached[:, -1]
    block = _first_beyond(block_reached, block_mass, wanted)
    before = (block_reached - block_mass).gather(1, block[:, None]).squeeze(1)
    inner_mass = mass_DBK[text, block].double()
    inner = _first_beyond(_cumulate(inner_mass), inner_mass, wanted - before)
    return block * BLOCK + inner


def _cumulate(mass: Float[torch.Tensor, "N K"]) -> Float[torch.Tensor, "N K"]:
    ones = torch.ones(mass.shape[1], mass.shape[1], dtype=mass.dtype, device=mass.device)
    return mass @ ones.triu()


def _first_beyond(
    reached: Float[torch.Tensor, "N K"], mass: Float[torch.Tensor, "N K"], wanted: Float[torch.Tensor, " N"]
) -> Int[torch.Tensor, " N"]:
    """First entry with mass whose cumulated mass exceeds `wanted`; the last one with mass if rounding leaves none."""
    possible = mass > 0
    beyond = possible & (reached > wanted[:, None])
    last = mass.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(beyond.any(dim=1), beyond.int().argmax(dim=1), last)


TEXTS_PER_CHUNK = 256
"""Texts projected onto the whole vocabulary at a time."""
DRAWN_TOGETHER = {"cpu": 16}
"""Texts whose distributions are made at a time: so few stay in a core's cache."""
WAVE_TOKENS = {"cpu": 16384}
"""Prompt tokens that are continued side by side."""
WAVE_TOKENS_ELSEWHERE = 131072
"""The same on accelerators."""
READ_TOGETHER = {"cpu": 96}
"""Tokens of a call up to which it reads ahead: by then it is products, not the reading of weights, that it costs."""
READ_TOGETHER_ELSEWHERE = 1024
"""The same on accelerators."""
LIKELY = 0.2
"""Share of the texts so far that must have gone on like this for it to be read ahead."""
CONTEXT = 3
"""Last tokens that a continuation is guessed from where the whole answer so far has never been written."""


class _Candidates(NamedTuple):
    """The few tokens that top-k may leave at a node, and their logits."""

    tokens: Int[np.ndarray, " M"]
    logits: Float[np.ndarray, " M"]


class Likely:
    """How answers went on so far, whatever their prompts."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._last: dict[tuple[int, ...], dict[int, int]] = {}

    def count(self, word: tuple[int, ...], token: int, times: int) -> None:
        """`times` answers that began with `word` went on with `token`."""
        for counts, key in ((self._counts, word), (self._last, word[-CONTEXT:])):
            following = counts.setdefault(key, {})
            following[token] = following.get(token, 0) + times

    def after(self, word: tuple[int, ...]) -> list[tuple[int, float]]:
        """Tokens that are likely to follow, with their shares."""
        following = self._counts.get(word) or self._last.get(word[-CONTEXT:]) or {}
        total = sum(following.values())
        return [(token, times / total) for token, times in following.items() if times >= LIKELY * total]


class _Tree:
    """The texts behind the prompts of one policy version, numbered as they were met.

    Lists, one entry a node: a node may be named before it is read.
    """

    def __init__(self) -> None:
        self.roots: dict[bytes, int] = {}
        self.children: list[dict[int, int]] = []
        self.word: list[tuple[int, ...]] = []
        """Tokens behind the prompt."""
        self.parent: list[int] = []
        self.text: list[Text | None] = []
        self.hidden: list[Float[torch.Tensor, " H"] | None] = []
        """Last hidden state; None before the node is read."""
        self.likely = Likely()
        self.read_last: list[int] = []
        """Nodes of the last call."""
        self.candidates: dict[int, dict[int, _Candidates]] = {}
        """By k of top-k, then by node."""

    def root(self, key: bytes, text: Text, hidden: Float[torch.Tensor, " H"]) -> None:
        """A prompt that has been read."""
        self.roots[key] = self._node(-1, ())
        self.text[-1], self.hidden[-1] = text, hidden

    def child(self, node: int, token: int) -> int:
        """The node of a text with one token more."""
        found = self.children[node].get(token)
        if found is None:
            found = self.children[node][token] = self._node(node, (*self.word[node], token))
        return found

    def _node(self, parent: int, word: tuple[int, ...]) -> int:
        self.children.append({})
        self.word.append(word)
        self.parent.append(parent)
        self.text.append(None)
        self.hidden.append(None)
        return len(self.word) - 1


class FreeDecoder:
    """Samples completions over the whole vocabulary under one policy version.

    Args:
        reader: reads prompts under that policy version.
        version: the version.
        capacity: tokens of prompts and completions whose keys and values are kept at most, besides the shared prefix;
            where a call leaves more, all are forgotten.
    """

    def __init__(self, reader: PromptReader, version: int, capacity: int) -> None:
        self.reader = reader
        self.policy = reader.policy
        self.version = version
        self.capacity = capacity
        self.computed_tokens = 0
        """Tokens computed behind the prompts, which the reader counts."""
        self.hits = 0
        """Distinct prompts of a call that an earlier call had met."""
        self.evictions = 0
        """Prompts forgotten for want of room."""
        device = self.policy.device.type
        self.read_together = READ_TOGETHER.get(device, READ_TOGETHER_ELSEWHERE)
        self.wave_tokens = WAVE_TOKENS.get(device, WAVE_TOKENS_ELSEWHERE)
        self.drawn_together = DRAWN_TOGETHER.get(device, TEXTS_PER_CHUNK)
        self.words = DecodedTexts(self.policy)
        self.pool = TextPool(reader)
        self._tree = _Tree()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        settled: Settled | None,
    ) -> list[Completion]:
        """One completion a prompt. `uniforms` in [0, 1) decide: row n, column c draws token c of completion n."""
        distinct, prompt_of = distinct_prompts(prompts)
        written = Written.nothing(uniforms.shape)
        by_length = sorted(range(len(distinct)), key=lambda number: len(distinct[number]))
        for wave in _filled(by_length, [len(prompt) for prompt in distinct], self.wave_tokens):
            root_of = self._roots([distinct[number] for number in wave])
            roots = dict(zip(wave, root_of, strict=True))
            rows = np.flatnonzero(np.isin(prompt_of, wave))
            nodes = np.array([roots[number] for number in prompt_of[rows].tolist()], dtype=np.int64)
            self._write(rows, nodes, sampling, uniforms, written, settled)
            if self.pool.tokens > self.capacity:
                self.evictions += len(self._tree.roots)
                self.pool.forget()
                self._tree = _Tree()
        return written.completions(distinct, prompt_of, self.words, self.version)

    def _roots(self, prompts: Sequence[Int[np.ndarray, " P"]]) -> list[int]:
        """The nodes of these distinct prompts, which are read where they are not known."""
        keys = [prompt.tobytes() for prompt in prompts]
        missing = [index for index, key in enumerate(keys) if key not in self._tree.roots]
        self.hits += len(keys) - len(missing)
        states = self.reader.read([prompts[index] for index in missing], keep=True)
        for index, state, text in zip(missing, states, self.pool.add(states), strict=True):
            self._tree.root(keys[index], text, state.hidden)
        return [self._tree.roots[key] for key in keys]

    def _write(
        self,
        rows: Int[np.ndarray, " n"],
        nodes: Int[np.ndarray, " n"],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        written: Written,
        settled: Settled | None,
    ) -> None:
        """Completes the texts at `nodes` (one a row of `uniforms` and `written`, in any number of tokens) to their end.

        A drawn token is copied to the host, which decides which texts there are next: two numbers a completion and
        token. Logits and distributions stay on the device, but for the few that top-k leaves.
        """
        tree = self._tree
        while len(rows):
            waiting_rows, waiting_nodes = list[Int[np.ndarray, " n"]](), list[Int[np.ndarray, " n"]]()
            while len(rows):
                tokens, logprobs = self._draw(nodes, sampling, uniforms[rows, written.lengths[rows]])
                place = written.lengths[rows]
                written.tokens[rows, place], written.logprobs[rows, place] = tokens, logprobs
                written.lengths[rows] += 1
                pairs, pair_of, times = np.unique(
                    np.stack([nodes, tokens], axis=1), axis=0, return_inverse=True, return_counts=True
                )
                for (node, token), count in zip(pairs.tolist(), times.tolist(), strict=True):
                    tree.likely.count(tree.word[node], token, count)
                children = np.array([tree.child(node, token) for node, token in pairs.tolist()], dtype=np.int64)
                over = np.array([self.words.is_over(tree.word[child], sampling, settled) for child in children])
                ready = np.array([tree.hidden[child] is not None for child in children])
                nodes, ended, known = (part[pair_of.ravel()] for part in (children, over, ready))
                written.stopped[rows] = ended
                goes_on = ~ended & (written.lengths[rows] < uniforms.shape[1])
                waiting_rows.append(rows[goes_on & ~known])
                waiting_nodes.append(nodes[goes_on & ~known])
                rows, nodes = rows[goes_on & known], nodes[goes_on & known]
            rows, nodes = np.concatenate(waiting_rows), np.concatenate(waiting_nodes)
            wanted = np.unique(nodes).tolist()
            if wanted:
                self._read(self._with_likely(wanted, sampling, uniforms.shape[1], settled))

    def _with_likely(
        self, wanted: Sequence[int], sampling: Sampling, longest: int, settled: Settled | None
    ) -> list[int]:
        """Nodes to be read, with what is likely to follow them; the likeliest first, until a call is well filled."""
        tree, nodes = self._tree, list(wanted)
        heap = [(-1.0, node) for node in wanted]
        while heap and len(nodes) < self.read_together:
            likelihood, node = heapq.heappop(heap)
            word = tree.word[node]
            if len(word) + 1 >= longest:
                continue
            for token, share in tree.likely.after(word):
                if -likelihood * share < LIKELY or self.words.is_over((*word, token), sampling, settled):
                    continue
                child = tree.child(node, token)
                heapq.heappush(heap, (likelihood * share, child))
                if tree.hidden[child] is None:
                    nodes.append(child)
        return nodes

    def _read(self, nodes: Sequence[int]) -> None:
        """Reads the last tokens of these nodes' texts; a node's parent has been read, or is among them."""
        tree, among = self._tree, set(nodes)

        def base_of(node: int) -> int:
            while node in among:
                node = tree.parent[node]
            return node

        bases = {node: base_of(node) for node in nodes}
        # Prompt by prompt and, behind one text, parents first: a longer word has more tokens.
        ordered = sorted(nodes, key=lambda node: (_columns(tree.text[bases[node]]), len(tree.word[node]), node))
        place = {node: number for number, node in enumerate(ordered)}
        texts = [text for node in ordered if (text := tree.text[bases[node]]) is not None]
        parents = [place.get(tree.parent[node], -1) for node in ordered]
        last = np.array([tree.word[node][-1] for node in ordered], dtype=np.int64)
        longer, hidden = self.pool.extend(texts, last, parents)
        self.computed_tokens += len(ordered)
        tree.read_last = ordered
        for node, text, state in zip(ordered, longer, hidden, strict=True):
            tree.text[node], tree.hidden[node] = text, state

    def _draw(
        self, nodes: Int[np.ndarray, " n"], sampling: Sampling, uniforms: Float[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """A token a completion, drawn at its node, and its log-probability."""
        distinct, node_of = np.unique(nodes, return_inverse=True)
        if self.policy.keeps_few(sampling):
            found = self._candidates(distinct.tolist(), sampling)
            logits = torch.from_numpy(np.stack([few.logits for few in found]))
            logprobs_DM = decoding_logprobs(logits, sampling).numpy()
            place = draw(logprobs_DM[node_of], uniforms, sampling.greedy)
            tokens_DM = np.stack([few.tokens for few in found])
            return tokens_DM[node_of, place], logprobs_DM[node_of, place]
        states = [state for node in distinct.tolist() if (state := self._tree.hidden[node]) is not None]
        order = np.argsort(node_of, kind="stable")
        parts = self._draw_whole(torch.stack(states), node_of[order], sampling, uniforms[order])
        tokens, logprobs = np.empty(len(nodes), dtype=np.int64), np.empty(len(nodes), dtype=np.float32)
        tokens[order], logprobs[order] = (np.concatenate(part) for part in zip(*parts, strict=True))
        return tokens, logprobs

    def _candidates(self, nodes: Sequence[int], sampling: Sampling) -> list[_Candidates]:
        """What top-k may leave at these nodes. A product with few rows costs the reading of the projection, so the
        nodes that were read with them are looked at as well.
        """
        assert sampling.top_k is not None
        known = self._tree.candidates.setdefault(sampling.top_k, {})
        if any(node not in known for node in nodes):
            missing = [node for node in {*nodes, *self._tree.read_last} if node not in known]
            states = [state for node in missing if (state := self._tree.hidden[node]) is not None]
            hidden = torch.stack(states).to(self.policy.product_dtype)
            found = top_logits(hidden, self.policy.output_weight(None), sampling.top_k)
            tokens, logits = (part.cpu().numpy() for part in found)
            known.update((node, _Candidates(*of_node)) for node, *of_node in zip(missing, tokens, logits, strict=True))
        return [known[node] for node in nodes]

    def _draw_whole(
        self,
        hidden: Float[torch.Tensor, "D H"],
        text_of: Int[np.ndarray, " n"],
        sampling: Sampling,
        uniforms: Float[np.ndarray, " n"],
    ) -> list[tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]]:
        """Draws from whole distributions, a bounded number of texts at a time; `text_of` ascends."""
        weight = self.policy.output_weight(None)
        parts = []
        for start in range(0, len(hidden), TEXTS_PER_CHUNK):
            logits = self.policy.project(hidden[start : start + TEXTS_PER_CHUNK], weight)
            for few in range(0, len(logits), self.drawn_together):
                logprobs = decoding_logprobs(logits[few : few + self.drawn_together], sampling)
                first, last = text_of.searchsorted((start + few, start + few + len(logprobs)))
                text = text_of[first:last] - start - few
                parts.append(draw_grouped(logprobs, text, uniforms[first:last], sampling.greedy))
        return parts


def _columns(text: Text | None) -> tuple[int, ...]:
    """Where a text stands in the pool: texts of one prompt begin in the same column."""
    return () if text is None else tuple(text.columns.tolist())


def _filled(numbers: Sequence[int], sizes: Sequence[int] | Mapping[int, int], room: int) -> list[list[int]]:
    """Numbers in order, in parts whose sizes add up to `room` at most (or of one number)."""
    parts: list[list[int]] = []
    filled = 0
    for number in numbers:
        filled += sizes[number]
        if not parts or filled > room:
            parts.append([])
            filled = sizes[number]
        parts[-1].append(number)
    return parts
