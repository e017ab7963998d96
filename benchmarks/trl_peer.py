"""TRL's `GRPOTrainer` on the same iteration, as shipped and tuned by hand. Needs the extra `peers`.

TRL 1.16 offers two ways to play a game: `environment_factory` (tools called within one growing conversation) and
`rollout_func` (one completion for each prompt of a batch of fixed size). Neither trains on one short prompt a *turn*,
of which an episode has a varying number. So TRL is given the flattened list of (prompt, step) that the lab's own
rollout met with the same seed: it generates an answer to each in one batch, without playing, and updates on all of
them. That spares it the game, the turns and the parsing, and lets it decode in one large batch.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.peer_job import PeerJob, PeerResult, Sample

SHIPPED_MICRO_BATCH = 8
"""`per_device_train_batch_size` as TRL ships it."""
TUNED_MICRO_BATCH = 16


class MissingPeerError(Exception):
    """A peer that is not installed; the message is one line with the remedy."""


def check_installed() -> None:
    """Raises `MissingPeerError` unless TRL can be imported."""
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise MissingPeerError(
                f"peers --only=trl: the package {package} is not installed; pip install -c constraints.txt "
                "-e '.[peers]', or leave trl out with --only ours,handwritten"
            )


def filled_up(samples: Sequence[Sample], micro_batch: int) -> list[Sample]:
    """The samples and the first ones again, up to a multiple of the micro-batch: TRL takes whole batches only."""
    missing = -len(samples) % micro_batch
    return [samples[index % len(samples)] for index in range(len(samples) + missing)]


def iterate(job: PeerJob, samples: Sequence[Sample], *, tuned: bool, seed: int, repetition: int) -> PeerResult:
    """One generation and one optimiser step over the samples.

    Timed from the beginning of TRL's optimiser step to its end, which holds generation, reward and update; loading the
    model and TRL's own set-up are not in it.

    Args:
        job: the iteration.
        samples: the (prompt, step) list.
        tuned: without activation recomputation (TRL ships it switched on), micro-batches of 16 instead of 8, and the
            vocabulary projection at completion positions only (without Triton TRL projects every position).
        seed: of TRL's draws.
        repetition: which one this is.

    Raises:
        MissingPeerError: TRL is not installed.
        RuntimeError: TRL reads other tokens than the lab does.
    """
    check_installed()
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    micro_batch = TUNED_MICRO_BATCH if tuned else SHIPPED_MICRO_BATCH
    rows = filled_up(samples, micro_batch)
    loaded = job.load()
    _check_tokens(loaded.tokenizer, samples)

    class Stopwatch(TrainerCallback):
        """Begins and ends with the optimiser step."""

        started = 0.0
        seconds = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.seconds = time.perf_counter() - self.started

    class InOrder(GRPOTrainer):  # type: ignore[misc]
        """Takes each row of the data set once and in order, instead of repeating every prompt for a group."""

        seen = 0

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            scored = super()._generate_and_score_completions(inputs)
            self.seen = int(scored["completion_mask"].sum())
            return scored

    class Tuned(InOrder):
        """The output projection at completion positions only."""

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **kwargs: Any,  # noqa: ARG002
        ) -> Any:
            logps, entropies = [], []
            for part in range(0, len(input_ids), batch_size or len(input_ids)):
                rows = slice(part, part + (batch_size or len(input_ids)))
                with self.accelerator.autocast():
                    output = model(
                        input_ids=input_ids[rows],
                        attention_mask=attention_mask[rows],
                        logits_to_keep=logits_to_keep + 1,
                        use_cache=False,
                    )
                logits = output.logits[:, :-1].float() / self.temperature
                logprobs = logits.log_softmax(dim=-1)
                logps.append(logprobs.gather(-1, input_ids[rows, -logits_to_keep:, None]).squeeze(-1))
                if compute_entropy:
                    with torch.no_grad():
                        entropies.append(-(logprobs.exp() * logprobs).sum(dim=-1))
            return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        """0 and 1 by turns, so that every pair has advantages and no gradient is 0: the answers are not judged."""
        return [float(index % 2) for index in range(len(completions))]

    sampling, stopwatch = job.config.rollout.sampling, Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(rows) // micro_batch,
            num_generations=2,  # the least; only how rewards are grouped
            max_steps=1,
            max_completion_length=job.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p or 1.0,
            learning_rate=job.config.optim.lr,
            adam_beta1=job.config.optim.betas[0],
            adam_beta2=job.config.optim.betas[1],
            max_grad_norm=job.max_grad_norm,
            beta=0.0,
            bf16=job.dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            **({"gradient_checkpointing": False} if tuned else {}),
        )
        trainer = (Tuned if tuned else InOrder)(
            model=loaded.model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in rows]),
            processing_class=loaded.tokenizer,
            peft_config=job.lora(),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        output = trainer.train()
    extra = len(rows) - len(samples)
    return PeerResult(
        peer="trl-tuned" if tuned else "trl",
        repetition=repetition,
        env_steps=len(rows),
        rollout_s=None,
        update_s=None,
        total_s=stopwatch.seconds,
        generated_tokens=trainer.seen,
        loss=float(output.training_loss),
        remark="generation and update on the lab's (prompt, step) list; plays no game"
        + (f"; {extra} prompts twice, to whole batches" if extra else ""),
    )


def _check_tokens(tokenizer: Any, samples: Sequence[Sample]) -> None:
    """Raises `RuntimeError` unless TRL's way of reading a prompt gives the lab's tokens."""
    for sample in {sample.prompt: sample for sample in samples}.values():
        if tokenizer(text=[sample.prompt])["input_ids"][0] != sample.prompt_ids.tolist():
            raise RuntimeError(f"peers: TRL would read other tokens than the lab for the prompt {sample.prompt!r}")
