"""Where text comes from: text, JSONL and Parquet files, folders of them, the text of Python's own library."""

import codecs
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.config import ConfigError

LIBRARY = "builtin:python-stdlib"
LIBRARY_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BINARY = {".arrow", ".bin", ".bz2", ".gz", ".npy", ".npz", ".pkl", ".pt", ".tar", ".tgz", ".xz", ".zip", ".zst"}
PART = 1 << 20  # bytes of a text file read at a time
PARQUET_ROWS = 256  # read at a time
FORMS = '{"text": …}, {"prompt": …, "completion": …} or {"tokens": […], "labels": [0 or 1, …]}'


@dataclass(frozen=True)
class Part:
    """A part of a document; parts follow one another up to the document's last.

    `content` is text, or tokens int64 [n]; `labelled` says which of its tokens carry labels: all, none, or
    bool [n]; `where` is for messages: the file, and line or row.
    """

    content: str | NDArray[np.int64]
    labelled: bool | NDArray[np.bool_]
    last: bool
    where: str


@dataclass(frozen=True)
class Source:
    """A source as the configuration names it, its files in the order in which they are read."""

    name: str
    root: Path
    files: list[Path]
    python: str | None = None  # version of Python, of the library's text

    def fingerprint(self) -> str:
        """Changes when the source does: the files' sizes and times; of the library, version and place."""
        facts: list[Any] = [str(self.root), self.python]
        if self.python is None:
            for path in self.files:
                status = path.stat()
                facts.append((str(path), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def parts(self, skipped: list[str]) -> Iterator[Part]:
        """All documents. Files of the library that aren't UTF-8 are added to `skipped`, not read.

        Raises ConfigError naming file and place for what can't be read.
        """
        for path in self.files:
            if self.python is not None:
                yield from _library_parts(path, self.root, skipped)
            elif path.suffix == ".jsonl":
                yield from _jsonl_parts(path)
            elif path.suffix == ".parquet":
                yield from _parquet_parts(path)
            else:
                yield from _text_parts(path)


def find_source(name: str) -> Source:
    """The source of that name: a file, a folder (all files in it, at any depth, none hidden), or LIBRARY.

    Raises ConfigError for a missing, empty or unsupported one.
    """
    if name == LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _files_below(root, LIBRARY_WITHOUT) if path.suffix == ".py"]
        if not files:
            raise ConfigError(f"data source {name}: this Python's library has no .py files; must have some")
        return Source(name, root, files, platform.python_version())
    root = Path(name).expanduser().resolve()
    if not name or name.startswith("builtin:") or not root.exists():
        raise ConfigError(f"data source '{name}': no such file or folder; must be a path, or {LIBRARY}")
    files = _files_below(root, set()) if root.is_dir() else [root]
    for path in files:
        if path.suffix in BINARY or not path.is_file():
            raise ConfigError(f"data source '{path}': unsupported file; must be text, .jsonl or .parquet")
    if not files:
        raise ConfigError(f"data source '{name}': no files in this folder; must be text, .jsonl or .parquet")
    return Source(name, root, files)


def _files_below(root: Path, without: set[str]) -> list[Path]:
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if n not in without and not n.startswith("."))
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _library_parts(path: Path, root: Path, skipped: list[str]) -> Iterator[Part]:
    try:
        yield Part(path.read_bytes().decode(), True, True, str(path))
    except UnicodeDecodeError:
        skipped.append(path.relative_to(root).as_posix())


def _text_parts(path: Path) -> Iterator[Part]:
    """One document, in parts of about PART bytes, so that memory stays bounded."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, text = 0, ""
    with path.open("rb") as file:
        while True:
            chunk = file.read(PART)
            pending = len(decoder.getstate()[0])
            try:
                text += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, read - pending + error.start) from None
            if not chunk:
                break
            read += len(chunk)
            if len(text) >= PART:
                cut = _last_line(text)
                yield Part(text[:cut], True, False, str(path))
                text = text[cut:]
    yield Part(text, True, True, str(path))


def _last_line(text: str) -> int:
    """Where the last line that begins with a word begins: few tokenizers join tokens across that."""
    found = re.match(r"(?s:.*)\n(?=\S)", text)
    return found.end() if found else len(text)


def _jsonl_parts(path: Path) -> Iterator[Part]:
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, read + error.start) from None
            read += len(line)
            if text.strip():
                yield from _record_parts(_parse(text, where), where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}); must be {FORMS}") from None


def _record_parts(record: Any, where: str) -> Iterator[Part]:
    fields = ("text", "prompt", "completion", "tokens", "labels")
    names = [name for name in fields if name in record] if isinstance(record, dict) else []
    if names == ["text"]:
        yield Part(_string(record, "text", where), True, True, where)
    elif names == ["prompt", "completion"]:
        yield Part(_string(record, "prompt", where), False, False, where)
        yield Part(_string(record, "completion", where), True, True, where)
    elif names in (["tokens"], ["tokens", "labels"]):
        tokens = _integers(record["tokens"], 1 << 32, "tokens", where)
        labels = _integers(record.get("labels", [1] * len(tokens)), 2, "labels", where)
        if len(labels) != len(tokens):
            raise ConfigError(f"{where}: {len(labels)} labels; must be as many as tokens: {len(tokens)}")
        yield Part(tokens, labels.astype(np.bool_), True, where)
    else:
        raise ConfigError(f"{where}: has {', '.join(names) or 'no known field'}; must be {FORMS}")


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is {type(value).__name__}; must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {name} has half a surrogate pair at {error.start}; must be text") from None
    return value


def _integers(values: Any, below: int, name: str, where: str) -> NDArray[np.int64]:
    if not isinstance(values, list):
        raise ConfigError(f"{where}: {name} is {type(values).__name__}; must be a list")
    for value in values:
        if type(value) is not int or not 0 <= value < below:
            shown = str(value)[:40]
            raise ConfigError(f"{where}: {name} has {shown}; must be integers from 0 to {below - 1}")
    return np.array(values, dtype=np.int64)


def _parquet_parts(path: Path) -> Iterator[Part]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"data source '{path}': Parquet needs pyarrow: pip install 'nsa-dist[data]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _parquet_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield from _record_parts(record, f"{path}, row {row}")
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"data source '{path}': can't be read as Parquet after row {row} ({reason})") from None


def _parquet_columns(path: Path, names: list[str]) -> list[str]:
    columns: list[str] = [name for name in ("text", "prompt", "completion") if name in names]
    if columns not in (["text"], ["prompt", "completion"]):
        given = ", ".join(names[:8])
        raise ConfigError(f"data source '{path}': columns {given}; must have text, or prompt and completion")
    return columns


def _not_utf8(path: Path, byte: int) -> ConfigError:
    return ConfigError(f"data source '{path}': not UTF-8 at byte {byte}; must be UTF-8 text")
