"""What a run logs on its way to the tracking store: written at once, or kept on disk until the store answers again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from msgrpo_lab.callbacks.entries import Entry, joined
from msgrpo_lab.callbacks.spool import Spool
from msgrpo_lab.callbacks.store import reason_of, store_errors
from msgrpo_lab.messages import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ATTEMPTS = 3
PAUSE_S = 0.5
"""Seconds before the second attempt to write an entry; each further pause is twice as long."""
FIRST_PROBE_S = 5.0
LONGEST_PROBE_S = 300.0
"""Seconds until a store that did not answer is asked again: the first time, and at most."""


class Outbox:
    """Writes a run's entries in order, each exactly once, whatever the tracking store does meanwhile.

    An entry is tried `ATTEMPTS` times. If the store still does not take it, it goes to the spool, and so does all that
    follows, so that training does not wait; the store is asked again now and then, with growing pauses. What not even
    the spool takes (a full disk) is held in memory and written as soon as either can be written again.

    Args:
        client: of the store.
        run_id: the run.
        spool: of the run; what an earlier process left in it is delivered first.
    """

    def __init__(self, client: MlflowClient, run_id: str, spool: Spool) -> None:
        self.client = client
        self.run_id = run_id
        self.spool = spool
        self.unwritten: list[Entry] = []
        """In memory only: neither the store nor the spool has taken them."""
        self.spooled = spool.path.exists()
        """Something waits in the spool."""
        self.trouble = ""
        """Why the store did not take the last entry; empty while all is well."""
        self._probe_at = 0.0
        self._pause_s = FIRST_PROBE_S

    @property
    def waiting(self) -> bool:
        """Whether something has not reached the store yet."""
        return self.spooled or bool(self.unwritten)

    def send(self, entry: Entry) -> None:
        """Writes an entry, or keeps it for later; never raises for the store's or the disk's sake."""
        if not self.waiting and self._attempt(entry):
            return
        self.unwritten.append(entry)
        self._keep()
        if time.monotonic() >= self._probe_at:
            self.flush()

    def entries(self) -> list[Entry]:
        """All that waits, oldest first.

        Raises:
            ValueError: the spool is damaged.
        """
        return [*(self.spool.entries() if self.spooled else ()), *self.unwritten]

    def flush(self) -> bool:
        """Delivers all that waits, if the store answers; whether nothing waits any more."""
        if not self.waiting:
            return True
        try:
            for entry in joined(self.entries()):
                entry.deliver(self.client, self.run_id)
        except store_errors() as error:
            self._postpone(error)
            return False
        except ValueError as error:
            # A damaged spool: the file stays for a human to look at, and what follows goes behind it.
            self._postpone(error)
            return False
        return self._delivered()

    def _attempt(self, entry: Entry) -> bool:
        """Whether the store took the entry, tried a few times."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                entry.deliver(self.client, self.run_id)
                return True
            except store_errors() as error:
                trouble: Exception = error
        log.warning(
            "%s does not take what is logged (%s): it is kept in %s and written when the store answers again",
            mask(self.spool.owner.tracking_uri),
            reason_of(trouble),
            self.spool.path,
        )
        self._pause_s = FIRST_PROBE_S / 2
        self._postpone(trouble)
        return False

    def _postpone(self, error: Exception) -> None:
        self.trouble = reason_of(error)
        self._pause_s = min(2 * self._pause_s, LONGEST_PROBE_S)
        self._probe_at = time.monotonic() + self._pause_s

    def _keep(self) -> None:
        """Moves what is in memory to the spool."""
        while self.unwritten:
            try:
                self.spool.append(self.unwritten[0])
            except OSError as error:
                if len(self.unwritten) == 1:
                    log.warning("%s cannot be written (%s): tried again later", self.spool.path, reason_of(error))
                return
            self.spooled = True
            del self.unwritten[0]

    def _delivered(self) -> bool:
        self.unwritten.clear()
        try:
            self.spool.clear()
        except OSError as error:
            # It will be delivered once more, which changes nothing.
            self._postpone(error)
            return False
        log.warning("%s answers again: nothing was lost", mask(self.spool.owner.tracking_uri))
        self.spooled, self.trouble = False, ""
        return True
