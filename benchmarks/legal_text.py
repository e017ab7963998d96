"""A way to read free text under which every answer is legal, so that a policy can be measured that never errs.

An untrained model's answers are mostly ⊥ or one word, so its episodes see few states. With this parser the same free
generation walks through many more of them, at exactly the same cost a state: the harder case for sharing work.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from msgrpo_lab.lap.prompt import FirstWordParser
from msgrpo_lab.types import ParsedAction


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryTextParser:
    """The first legal word; a text without one names the action that its CRC-32 falls on. Never ⊥."""

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        parsed = FirstWordParser()(text, legal_actions)
        if parsed.action is not None:
            return parsed
        return ParsedAction(action=zlib.crc32(text.encode()) % len(legal_actions), span=(0, len(text)), error=None)
