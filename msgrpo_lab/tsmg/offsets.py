"""Places as seen from the player, in words; both games write them alike."""

from __future__ import annotations


def offset(down: int, right: int) -> str:
    """`2 down and 1 right`, from rows down and columns right; empty where both are 0."""
    parts = []
    if down:
        parts.append(f"{abs(down)} {'down' if down > 0 else 'up'}")
    if right:
        parts.append(f"{abs(right)} {'right' if right > 0 else 'left'}")
    return " and ".join(parts)
