"""Every file under conf/loss is a loss, with all of its arguments written out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.loss import MSGRPOLoss

PATHS = sorted((Path(__file__).resolve().parents[2] / "conf" / "loss").glob("*.yaml"))


def test_there_is_the_reference_loss():
    assert "ms_grpo" in {path.stem for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_names_every_argument(path):
    config = OmegaConf.load(path)
    assert set(config) - {"_target_"} == set(type(instantiate(config)).__dataclass_fields__)


def test_the_reference_is_the_small_model_recipe():
    loss = instantiate(OmegaConf.load(next(path for path in PATHS if path.stem == "ms_grpo")))
    assert loss == MSGRPOLoss(eps_low=0.2, eps_high=0.2, beta=0.0, reduction="sequence", constant=None, entropy=0.03)
    assert loss == MSGRPOLoss()
