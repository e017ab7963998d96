"""Saved weights that are not as they were written are refused, and the file named; code that lies beside is not run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from msgrpo_lab.evaluation.trained import read_weights
from msgrpo_lab.files import NAME, check_manifest
from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.sources import HubModel, LocalModel, ModelSourceError, RandomLlama

TINY = RandomLlama(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module", params=["adapter", "all weights"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "weights"
    rank = 2 if request.param == "adapter" else None
    build_policy(source=TINY, precision="float32", lora_rank=rank).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_weights_as_they_were_written_pass(folder: Path) -> None:
    assert check_manifest(folder)
    assert read_weights(folder) is not None


def test_any_flipped_byte_of_any_file_is_refused_and_the_file_named(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for at in {0, len(original) - 1, *rng.integers(len(original), size=12).tolist()}:
            damaged = bytearray(original)
            damaged[at] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged or another file") as told:
                read_weights(folder)
            assert str(told.value).startswith(f"{path}: "), f"byte {at} of {path.name}"
            assert len(str(told.value).splitlines()) == 1
        path.write_bytes(original)
    assert read_weights(folder) is not None


def test_a_file_that_is_missing_or_cut_is_named(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{weights.name}: has {len(content) - 10} bytes instead of {len(content)}"):
        read_weights(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=rf"{weights.name}: is missing"):
        read_weights(folder)


def test_a_folder_without_a_manifest_is_read_and_damage_to_its_tensors_told(folder: Path) -> None:
    (folder / NAME).unlink()
    assert not check_manifest(folder)
    if not (folder / "config.json").is_file():
        return
    LocalModel(path=str(folder)).load(torch.float32)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelSourceError, match="its weights cannot be read") as told:
        LocalModel(path=str(folder)).load(torch.float32)
    assert len(str(told.value).splitlines()) == 1


def test_a_tampered_model_folder_is_refused_when_it_is_loaded(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        pytest.skip("an adapter is no model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelSourceError, match=r"config\.json: .*damaged or another file"):
        LocalModel(path=str(folder)).load(torch.float32)


def test_code_beside_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    if not (folder / "config.json").is_file():
        pytest.skip("an adapter is no model")
    (folder / NAME).unlink()
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": names}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ModelSourceError):
        LocalModel(path=str(folder)).load(torch.float32)
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_run_only_if_asked_by_name_and_of_one_commit() -> None:
    assert HubModel(repo="a/b").trust_remote_code is False
    with pytest.raises(ModelSourceError, match=r"trust_remote_code=true: the code of revision main may be another"):
        HubModel(repo="a/b", trust_remote_code=True)
    assert HubModel(repo="a/b", revision="0" * 40, trust_remote_code=True)
    for empty in ({"repo": ""}, {"repo": "a/b", "revision": " "}):
        with pytest.raises(ModelSourceError, match="must not be empty; give"):
            HubModel(**empty)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
