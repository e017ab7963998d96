"""The reference loss of the configuration is the reference loss of the code."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.loss import MSGRPOLoss

CONF = Path(__file__).resolve().parents[2] / "conf" / "loss"


def test_the_reference_is_the_small_model_recipe():
    loss = instantiate(OmegaConf.load(CONF / "ms_grpo.yaml"))
    assert loss == MSGRPOLoss(eps_low=0.2, eps_high=0.2, beta=0.0, reduction="sequence", constant=None, entropy=0.0)
    assert loss == MSGRPOLoss()
