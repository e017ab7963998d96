"""Configuration safety: where the files lie, what may stand in them, and one line for every mistake.

A command line is checked before anything is loaded (`check_command_line`), and a composed configuration can be checked
by itself (`validate`). Nothing here imports torch, transformers or Lightning unless a component that needs them is
being checked, so that a mistyped option is answered at once.
"""

from __future__ import annotations

from msgrpo_lab.config.command_line import check_command_line
from msgrpo_lab.config.paths import conf_dir, project_root
from msgrpo_lab.config.schemas import PathsConfig, RolloutConfig, SamplingConfig, UpdateConfig, register
from msgrpo_lab.config.validation import validate
from msgrpo_lab.messages import ConfigError

__all__ = [
    "ConfigError",
    "PathsConfig",
    "RolloutConfig",
    "SamplingConfig",
    "UpdateConfig",
    "check_command_line",
    "conf_dir",
    "project_root",
    "validate",
]

register()
