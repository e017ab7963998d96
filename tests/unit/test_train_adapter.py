"""The kept policies: the best survives a later fall, and what was written gives the same logits when read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab_made import fit, small_lab, small_policy
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from msgrpo_lab.callbacks.checkpoints import AdapterKeeper
from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.lap.sources import RandomLlama
from msgrpo_lab.training.assemble import Lab

TOKENS = torch.tensor([[7, 30, 41, 9]])


class Told(HeldOutEvaluation):
    """An evaluation whose scores are decided beforehand, and that keeps the logits of each policy it sees."""

    def __init__(self, scores: list[float], every: int = 1) -> None:
        super().__init__(episodes=1, every=every, scenario="lake", reference_simulations=1)
        self.scores = scores
        self.logits: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.logits.append(pl_module.policy.model(input_ids=TOKENS).logits.clone())
        if (trainer.current_epoch + 1) % self.every == 0:
            self.latest = {"eval/lake/return_mean": self.scores[trainer.current_epoch]}
            self.evaluated_at = trainer.global_step


def kept(folder: Path, scores: list[float], *overrides: str, every: int = 1) -> tuple[Lab, Told, AdapterKeeper]:
    lab, told = small_lab("optim.lr=0.02", "optim.warmup_updates=0", *overrides), Told(scores, every)
    keeper = AdapterKeeper(folder=folder, evaluation=told)
    fit(lab, epochs=len(scores), callbacks=[told, keeper])
    return lab, told, keeper


@torch.no_grad()
def read_back(folder: Path, lora: bool) -> torch.Tensor:
    if lora:
        base = RandomLlama(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, init_seed=0)
        model: Any = PeftModel.from_pretrained(base.load(torch.float32).model, str(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.9, 0.3], 1), ([0.9, 0.1, 0.1], 0), ([0.1, 0.2, 0.3], 2)])
def test_best_and_last_are_written_and_read_back(tmp_path: Path, scores: list[float], best: int, lora: bool) -> None:
    lab, told, keeper = kept(tmp_path, scores, f"model.lora_rank={4 if lora else 'null'}")
    torch.testing.assert_close(read_back(tmp_path / "adapter/best", lora), told.logits[best], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(read_back(tmp_path / "adapter/last", lora), told.logits[-1], atol=1e-6, rtol=1e-5)
    assert float((told.logits[0] - told.logits[-1]).abs().max()) > 1e-3
    assert (keeper.best_score, keeper.best_update) == (scores[best], best + 1)
    with torch.no_grad():
        now = lab.policy.model(input_ids=TOKENS).logits
    assert torch.equal(now, told.logits[-1]), "writing the best leaves the last in place"


def test_of_equal_scores_the_first_is_kept(tmp_path: Path) -> None:
    assert kept(tmp_path, [0.5, 0.5, 0.5])[2].best_update == 1


def test_epochs_without_an_evaluation_are_not_taken_for_the_best(tmp_path: Path) -> None:
    _, told, keeper = kept(tmp_path, [0.0, 0.4, 0.0, 0.2], every=2)
    assert (keeper.best_update, keeper.best_score) == (2, 0.4)
    torch.testing.assert_close(read_back(tmp_path / "adapter/best", False), told.logits[1], atol=1e-6, rtol=1e-5)


def test_without_any_evaluation_only_the_last_is_written(tmp_path: Path) -> None:
    kept(tmp_path, [0.0, 0.0], every=9)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["last"]


def test_what_an_earlier_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter/best").mkdir(parents=True)
    (tmp_path / "adapter/best/stale").write_text("x")
    kept(tmp_path, [0.0], every=9)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["last"]


def test_an_adapter_is_small_and_weights_come_with_their_tokenizer(tmp_path: Path) -> None:
    small_policy(lora_rank=2).save(tmp_path / "lora")
    small_policy().save(tmp_path / "all")
    assert {path.name for path in (tmp_path / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "lora/model.safetensors").exists()
    assert (tmp_path / "all/model.safetensors").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "all")
    text = "<|user|>hole Left 12<|end|><|assistant|>"
    assert tokenizer.encode(text) == small_policy().tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_told_to_end_keeps_what_it_has_learnt(tmp_path: Path, ending: type[BaseException]) -> None:
    class Ending(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ending

    lab, told = small_lab(), Told([0.1], 1)
    keeper = AdapterKeeper(folder=tmp_path, evaluation=told)
    with pytest.raises(SystemExit):
        fit(lab, epochs=3, callbacks=[keeper, Ending()])
    assert list((tmp_path / "adapter" / "last").glob("*.safetensors"))
