"""Policy-gradient losses: from log-probabilities and advantages to one number. One file a loss."""

from msgrpo_lab.loss.base import LossStats, PolicyGradientLoss, Reduction, exp_tangent, k3, reduce_terms, sum_stats
from msgrpo_lab.loss.cispo import CISPOLoss
from msgrpo_lab.loss.gspo import GSPOLoss
from msgrpo_lab.loss.ms_grpo import MSGRPOLoss, ms_grpo_loss
from msgrpo_lab.loss.reinforce import ReinforceLoss

__all__ = [
    "CISPOLoss",
    "GSPOLoss",
    "LossStats",
    "MSGRPOLoss",
    "PolicyGradientLoss",
    "Reduction",
    "ReinforceLoss",
    "exp_tangent",
    "k3",
    "ms_grpo_loss",
    "reduce_terms",
    "sum_stats",
]
