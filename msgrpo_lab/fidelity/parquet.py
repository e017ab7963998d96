"""Parquet files of rows and metadata with a checksum over both: what was not written so is refused, and the file named.

The checksum is of what a file says, not of its bytes: a change that says nothing else, as in Parquet's own statistics,
is none. It tells damage, not forgery: whoever can write the file can write another checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msgrpo_lab.fidelity.columns import SCHEMA, Columns
from msgrpo_lab.files import written_whole

log = logging.getLogger(__name__)

VERSION = "msgrpo_lab.rollouts/2"
"""Names the layout of a file; another layout gets another number."""
WITHOUT_DIGEST = "msgrpo_lab.rollouts/1"
"""The same without a checksum; still read."""
META = b"msgrpo_lab"
"""Key of the metadata, a JSON text, in the Parquet schema."""
DIGEST = b"msgrpo_lab.sha256"
"""Key of the checksum."""
MAGIC = b"PAR1"
"""What a Parquet file begins and ends with."""


def write_rows(path: Path, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Writes rows and metadata, whole or not at all.

    Raises:
        OSError: it cannot be written; what stood there still does.
        ValueError: a value that JSON cannot hold.
    """
    text = json.dumps({"schema": VERSION, **meta}, allow_nan=False).encode()
    schema = SCHEMA.with_metadata({META: text, DIGEST: content_digest(columns, text)})
    table = pa.table(dict(columns), schema=schema)
    with written_whole(path) as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)


def read_rows(path: Path) -> tuple[Columns, dict[str, Any]]:
    """The rows and the metadata of a file, as they were written.

    Raises:
        ValueError: there is no such file, it is none of this layout, or damaged; one line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(told(path, what, "give a file that callbacks.rollouts has written"))
    ends = _ends(path)
    if ends[0] != MAGIC:
        raise ValueError(told(path, "is no Parquet file", "give a file that callbacks.rollouts has written"))
    if ends[1] != MAGIC:
        raise ValueError(told(path, "is cut short", "copy it again, or save the rollout again"))
    try:
        schema = pq.read_schema(path)
        text, digest = (schema.metadata or {}).get(META, b"null"), (schema.metadata or {}).get(DIGEST)
        meta = json.loads(text)
        _check_schema(path, schema, meta)
        columns = pq.read_table(path, columns=SCHEMA.names, page_checksum_verification=True).to_pydict()
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(told(path, f"is damaged ({reason})", "copy it again, or save the rollout again")) from error
    if digest is None and meta["schema"] == WITHOUT_DIGEST:
        log.warning("rollouts=%s: written by an earlier version, without a checksum: damage to it cannot be told", path)
    elif digest != content_digest(columns, text):
        raise ValueError(told(path, "is damaged (its checksum is another)", "copy it again, or save the rollout again"))
    return columns, meta


def content_digest(columns: Columns, meta: bytes) -> bytes:
    """SHA-256 in hexadecimal digits over what a rollout file says: its metadata, and every value of every column."""
    digest = hashlib.sha256(meta)
    for name in SCHEMA.names:
        # A list's literal tells its values and their types apart, floats to the bit.
        digest.update(f"{name}={list(columns[name])!r}".encode(errors="surrogatepass"))
    return digest.hexdigest().encode()


def _ends(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as stream:
        first = stream.read(len(MAGIC))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(MAGIC)))
        return first, stream.read() if size >= 3 * len(MAGIC) else b""


def _check_schema(path: Path, schema: pa.Schema, meta: Any) -> None:
    if not isinstance(meta, dict) or "schema" not in meta:
        raise ValueError(told(path, "is Parquet, but no rollout", "give a file that callbacks.rollouts has written"))
    if meta["schema"] not in (VERSION, WITHOUT_DIGEST):
        remedy = "save the rollout again, or read it with the version of the lab that wrote it"
        raise ValueError(told(path, f"has the schema {meta['schema']}; this version reads {VERSION}", remedy))
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        columns = "column" if len(missing) == 1 else "columns"
        raise ValueError(told(path, f"lacks the {columns} {', '.join(missing)}", "save the rollout again"))
    for wanted in SCHEMA:
        found = schema.field(wanted.name).type
        if found != wanted.type:
            raise ValueError(
                told(path, f"has {found} in column {wanted.name}, which is {wanted.type}", "save the rollout again")
            )


def told(path: Path, problem: str, remedy: str) -> str:
    """A line about a file."""
    return f"rollouts={path}: {problem}; {remedy}"
