"""Uploads what runs could not write to a tracking store that failed: `python -m msgrpo_lab.upload <run folder>…`.

A folder may be a run's, a sweep's or any above them: every spool below it is uploaded and removed. That of a run
that is still going is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msgrpo_lab.messages import HIDDEN
from msgrpo_lab.runs.folder import RunFolderError, lock_folder
from msgrpo_lab.tracking.database import check_reachable, mlflow_module, reason_of, store_errors
from msgrpo_lab.tracking.outbox import SPOOLS, Metrics, known_points, merge, points_of, read_spool, without_known


def upload(spool: Path, tracking_uri: str | None = None) -> int:
    """Writes a spool's entries to its run and removes the file; points that the run has already are left out.

    The run's folder is held meanwhile, so that no process appends to the file between its last line and its end.

    Args:
        spool: the file.
        tracking_uri: of the store, where it is not the one that the spool names.

    Returns:
        Metric points written.

    Raises:
        RunFolderError: the run is going on.
        ValueError: the spool cannot be read, or the store does not take it; the file is as it was.
    """
    with lock_folder(spool.parent):
        # What was found a moment ago may have been delivered by the run itself.
        return _deliver(spool, tracking_uri) if spool.exists() else 0


def _deliver(spool: Path, tracking_uri: str | None) -> int:
    owner, entries = read_spool(spool)
    uri = tracking_uri or owner.tracking_uri
    if HIDDEN in uri:
        raise ValueError(f"{spool}: the password of {uri} is not kept in files; give --tracking-uri")
    check_reachable(uri)
    client, written = mlflow_module().MlflowClient(uri), 0
    try:
        known = known_points(client, owner.run_id)
        for entry in merge(entries):
            rest = without_known(entry, known) if isinstance(entry, Metrics) else entry
            rest.deliver(client, owner.run_id)
            written += len(points_of([rest]))
    except store_errors() as error:
        raise ValueError(f"{spool}: {uri} does not take it ({reason_of(error)}); try again later") from error
    spool.unlink()
    return written


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line a spool; exit code 1 if one could not be uploaded, 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m msgrpo_lab.upload", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of a run or a sweep")
    parser.add_argument("--tracking-uri", help="of the store, where it has moved or needs a password")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not folder.exists():
            parser.exit(2, f"msgrpo_lab: {folder}: there is no such folder; give a run's or a sweep's\n")
    spools = sorted({spool for folder in options.folders for spool in folder.rglob(SPOOLS)})
    failed = False
    for spool in spools:
        try:
            print(f"{spool}: {upload(spool, options.tracking_uri)} metric points written")
        except RunFolderError:
            print(f"{spool}: left alone, the run is still going and delivers it itself")
        except (ValueError, OSError) as error:
            failed = True
            print(f"msgrpo_lab: {error}", file=sys.stderr)
    if not spools:
        print("nothing waits to be uploaded")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
