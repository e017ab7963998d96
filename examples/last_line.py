"""A parser for models that think aloud before they answer."""

from __future__ import annotations

from dataclasses import dataclass

from msgrpo_lab.lap.prompt import FirstWordParser
from msgrpo_lab.types import ParsedAction


@dataclass(frozen=True, slots=True, kw_only=True)
class LastLineParser:
    """The first legal word of the last line that is not empty."""

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        kept = text.rstrip()
        start = kept.rfind("\n") + 1
        parsed = FirstWordParser()(kept[start:], legal_actions)
        if parsed.span is None:
            return parsed
        return ParsedAction(action=parsed.action, span=(start + parsed.span[0], start + parsed.span[1]), error=None)
