"""One measurement: a rollout and its update, from the same weights and the same seeds whatever was measured before."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from benchmarks.flops import Row, Work, work_of
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.types import TrainBatch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One rollout and update. Times in seconds; rates are the properties."""

    variant: str
    repetition: int
    seed: int
    groups: int
    env_steps: int
    rollout_s: float
    credit_s: float
    collate_s: float
    update_s: float
    stopwatch_s: float
    """The whole of Lightning's fit, for comparison: with its own set-up around the four parts."""
    generated_tokens: int
    trained_tokens: int
    computed_tokens: float
    """Tokens that the update really ran, as the module counts them."""
    distinct_prompts: int
    distinct_rows: int
    """Distinct (prompt, completion) pairs among the samples that were trained on."""
    samples: int
    work: Work
    """The least work that the update can do: every distinct token once."""
    peak_memory_mb: float | None
    """Highest resident (CUDA: allocated) memory during the measurement; None where it cannot be reset, and in all but
    the first repetition."""
    base_memory_mb: float | None
    """The same at its start: model, optimiser and program."""

    @property
    def total_s(self) -> float:
        """Rollout, credit, collation and update."""
        return self.rollout_s + self.credit_s + self.collate_s + self.update_s

    @property
    def env_steps_per_s(self) -> float:
        """Environment steps a second, end to end."""
        return self.env_steps / self.total_s

    @property
    def rollout_steps_per_s(self) -> float:
        """Environment steps a second of the rollout alone."""
        return self.env_steps / self.rollout_s

    @property
    def update_steps_per_s(self) -> float:
        """Environment steps a second of collation and update alone."""
        return self.env_steps / (self.collate_s + self.update_s)

    @property
    def generated_tokens_per_s(self) -> float:
        """Sampled tokens a second of the rollout."""
        return self.generated_tokens / self.rollout_s

    @property
    def trained_tokens_per_s(self) -> float:
        """Completion tokens in the loss a second of the update."""
        return self.trained_tokens / self.update_s

    @property
    def memory_rise_mb(self) -> float | None:
        """How far memory rose above what was used at the start of the measurement."""
        if self.peak_memory_mb is None or self.base_memory_mb is None:
            return None
        return self.peak_memory_mb - self.base_memory_mb

    @property
    def distinct_row_ratio(self) -> float:
        """Share of the samples that are distinct rows."""
        return self.distinct_rows / self.samples


class _Memory(Logger):
    """Keeps the one row that an update logs."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    @property
    def name(self) -> str:
        """See Lightning."""
        return "benchmark"

    @property
    def version(self) -> int:
        """See Lightning."""
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing is asked of them here."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # noqa: ARG002
        """See Lightning."""
        self.metrics |= metrics


@contextmanager
def untouched(policy: torch.nn.Module) -> Iterator[None]:
    """Puts the trainable parameters back afterwards, so that the next measurement starts from the same policy."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None


@contextmanager
def resized(lab: Lab, *, groups: int, group_size: int) -> Iterator[None]:
    """The lab with fewer episodes for a while, all of them drawn: for warming up."""
    data: Any = lab.data
    kept = data.num_groups, data.group_size, data.sampler
    data.num_groups, data.group_size = groups, group_size
    data.sampler = replace(data.sampler, num_episodes=groups * group_size)
    try:
        yield
    finally:
        data.num_groups, data.group_size, data.sampler = kept


class _Batches(L.Callback):
    """Keeps the batches that are trained on, by reference."""

    def __init__(self) -> None:
        self.batches: list[TrainBatch] = []

    def on_train_batch_start(
        self,
        trainer: L.Trainer,  # noqa: ARG002  Lightning's signature
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: TrainBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """See Lightning."""
        self.batches.append(batch)

    def rows(self) -> list[Row]:
        """Prompt and completion of every sample."""
        found: list[Row] = []
        for batch in self.batches:
            ids, read, written = (
                tensor.cpu().numpy() for tensor in (batch.input_ids, batch.attention_mask, batch.completion_mask)
            )
            prompts, ends = (read & ~written).sum(axis=1).tolist(), read.sum(axis=1).tolist()
            found += [(row[:start], row[start:end]) for row, start, end in zip(ids, prompts, ends, strict=True)]
        return found


def measure(lab: Lab, *, variant: str, repetition: int, seed: int, accelerator: str = "auto") -> Measurement:
    """Runs one epoch (a rollout, its credit and one pass of updates) and takes what the lab says of it.

    The policy's weights are the same before and after. Times are the lab's own (`perf/rollout_s`, `perf/update_s`, …).
    Memory is that of the first repetition: its peak can only be told after freed memory was given back, which training
    does not do, and which makes the measurement slower.
    """
    memory, batches = _Memory(), _Batches()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=1,
        logger=memory,
        callbacks=[batches],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    lab.data.seed = seed
    with untouched(lab.policy):
        base = reset_peak_memory() if repetition <= 0 else None
        started = time.perf_counter()
        trainer.fit(lab.module, datamodule=lab.data)
        stopwatch_s = time.perf_counter() - started
        peak = None if base is None else peak_memory_mb()
    rollout = lab.data.rollout
    if rollout is None:
        raise RuntimeError("benchmark: the epoch collected no rollout")
    metrics = memory.metrics
    rows = batches.rows()
    distinct = {(prompt.tobytes(), completion.tobytes()): (prompt, completion) for prompt, completion in rows}
    turns = [turn for episode in rollout.episodes for turn in episode.turns]
    return Measurement(
        variant=variant,
        repetition=repetition,
        seed=seed,
        groups=lab.data.num_groups,
        env_steps=len(turns),
        rollout_s=metrics["perf/rollout_s"],
        credit_s=metrics["perf/credit_s"],
        collate_s=metrics["perf/collate_s"],
        update_s=metrics["perf/update_s"],
        stopwatch_s=stopwatch_s,
        generated_tokens=sum(len(turn.completion.token_ids) for turn in turns),
        trained_tokens=sum(len(completion) for _, completion in rows),
        computed_tokens=metrics["perf/computed_tokens"],
        distinct_prompts=len({prompt for prompt, _ in distinct}),
        distinct_rows=len(distinct),
        samples=len(rows),
        work=work_of(lab.policy, list(distinct.values()), constrained=lab.data.sampling.choices is not None),
        peak_memory_mb=peak,
        base_memory_mb=base,
    )


def reset_peak_memory() -> float | None:
    """Sets the peak of used memory back to what is used now, and returns that (MB); None where it cannot be set back.

    Freed memory is first given back to the system, so that one measurement does not start with another's.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")  # VmHWM := VmRSS; see proc(5)
    except OSError:
        return None
    return peak_memory_mb()


def peak_memory_mb() -> float:
    """Highest memory since `reset_peak_memory`, in MB: of the CUDA allocator, or resident (VmHWM)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
