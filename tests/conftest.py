"""What all tests share: one thread, and quiet libraries. Builders live in `lab_made.py` beside this file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet_lightning() -> Iterator[None]:
    """Lightning says on every fit what hardware there is not, and advises workers for loaders that cannot have any."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            r".*does not have many workers.*",
            r".*isinstance\(treespec, LeafSpec\).*",
            r".*module\(s\) in eval mode.*",
            r".*is_gradient_checkpointing.*",
            r".*gradient_checkpointing_enable.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
