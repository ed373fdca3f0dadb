"""Text to token files: done once for a source and a tokenizer, opened as memory maps ever after.

A prepared folder holds `tokens.bin` (uint16, or uint32 for vocabularies above 65,536), `offsets.npy` (int64
[documents + 1], where each document starts), `labels.bin` (uint8, 1 where a token is a label; only if some
token is none) and `meta.json`. It is written under another name and renamed into place, so that a folder
that has its name is complete.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.config import ConfigError, DataConfig
from nsa_dist.sources import Part, Source, find_source
from nsa_dist.tokenizer import Tokenizer, load_tokenizer, tokenizer_key

FORMAT = 1
BATCH = 1 << 20  # characters tokenised at a time
SAY_EVERY_S = 5.0
ABANDONED_S = 24 * 3600.0  # unfinished folders that nobody wrote to for so long are removed
COPY = 1 << 24  # label bytes written at a time


@dataclass(frozen=True)
class TokenFile:
    """A prepared source: memory maps `tokens` [N], `labels` uint8 [N] or None; `offsets` int64 [documents + 1]."""

    meta: dict[str, Any]
    tokens: NDArray[Any]
    labels: NDArray[np.uint8] | None
    offsets: NDArray[np.int64]


def prepare_source(name: str, config: DataConfig, say: Callable[[str], None]) -> Path:
    """The folder with the source's tokens, made now unless it is there already.

    Several processes may prepare one source at once: each writes its own folder, the first to end wins.
    `say` gets lines of progress. Raises ConfigError for what can't be read, and for fewer than 2 tokens;
    a folder that is there is checked when it is opened.
    """
    source = find_source(name)
    folder = _folder(source, config)
    if folder.exists():
        return folder
    tokenizer = load_tokenizer(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temporary = folder.parent / f".unfinished-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            _write(temporary, source, config, tokenizer, say)
            _check_unchanged(name, folder, config)
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"data source '{name}': can't be prepared in {folder.parent} ({error})") from None
    return folder


def open_prepared(name: str, config: DataConfig) -> TokenFile:
    """The prepared tokens of a source. Raises ConfigError where it isn't prepared, or damaged."""
    folder = _folder(find_source(name), config)
    if not folder.exists():
        raise ConfigError(f"data source '{name}': not prepared, or changed since; run nsa-dist prepare")
    return open_folder(folder)


def open_folder(folder: Path) -> TokenFile:
    """The tokens of a prepared folder, checked against its meta.json by sizes and offsets (not by digests)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, file in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                raise ValueError(f"{name} has {size} bytes; must be {file['bytes']}")
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        _check_offsets(offsets, meta)
        tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r", shape=(meta["tokens"],))
        labels = None
        if "labels.bin" in meta["files"]:
            labels = np.memmap(folder / "labels.bin", np.uint8, "r", shape=(meta["tokens"],))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"prepared data '{folder}': damaged ({reason}); delete this folder") from None
    return TokenFile(meta, tokens, labels, offsets)


def _check_offsets(offsets: Any, meta: dict[str, Any]) -> None:
    good = offsets.dtype == np.int64 and offsets.shape == (meta["documents"] + 1,)
    if not good or offsets[0] != 0 or offsets[-1] != meta["tokens"] or (np.diff(offsets) < 1).any():
        raise ValueError("offsets.npy doesn't fit meta.json")


def _folder(source: Source, config: DataConfig) -> Path:
    facts = [FORMAT, source.fingerprint(), tokenizer_key(config)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.name.rstrip("/").rsplit("/", 1)[-1])[:40].strip(".-")
    return _cache_dir(config) / f"{label or 'source'}-{key[:24]}"


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nsa-dist"


def _remove_abandoned(cache: Path) -> None:
    """What a killed process left: it never counts, but it takes space."""
    for folder in cache.glob(".unfinished-*"):
        times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
        if times and max(times) < time.time() - ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _check_unchanged(name: str, folder: Path, config: DataConfig) -> None:
    if _folder(find_source(name), config) != folder:
        raise ConfigError(f"data source '{name}': changed while it was read; must stay as it is")


def _put_in_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        open_folder(folder)  # another process was quicker


def _write(
    folder: Path, source: Source, config: DataConfig, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    writer = _Writer(folder, tokenizer)
    skipped: list[str] = []
    said = time.monotonic()
    say(f"preparing {source.name}")
    with writer:
        for batch in _batches(source.parts(skipped)):
            writer.add(batch)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"preparing {source.name}: {writer.tokens:,} tokens, {writer.documents:,} documents")
    if writer.tokens < 2:
        raise ConfigError(f"data source '{source.name}': {writer.tokens} tokens; must have at least 2")
    meta = {
        "format": FORMAT,
        "source": source.name,
        "python": source.python,
        "skipped_files": skipped,
        "tokenizer": config.tokenizer,
        "tokenizer_key": tokenizer_key(config),
        "vocab_size": tokenizer.vocab_size,
        **writer.finish(),
    }
    _write_synced(folder / "meta.json", json.dumps(meta, indent=1).encode())
    left_out = f" ({len(skipped)} files that aren't UTF-8 skipped)" if skipped else ""
    say(f"prepared {source.name}: {writer.tokens:,} tokens, {writer.documents:,} documents{left_out}")


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Parts in lists of about BATCH characters: a tokenizer takes a list's texts side by side."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.content) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


class _Writer:
    """Writes parts of documents one after another; a document without tokens is left out and counted."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.tokens = 0
        self.empty = 0
        self.offsets = array("q", [0])
        self.text = hashlib.sha256()
        self.token_file = (folder / "tokens.bin").open("wb")
        self.label_file: Any = None  # made at the first token that is no label

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in filter(None, (self.token_file, self.label_file)):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def add(self, parts: list[Part]) -> None:
        """Tokenises and writes. Raises ConfigError for given tokens that the vocabulary doesn't have."""
        texts = [part.content for part in parts if isinstance(part.content, str)]
        encoded = iter(self.tokenizer.encode(texts))
        for part in parts:
            if isinstance(part.content, str):
                self.text.update(part.content.encode())
                self._append(next(encoded), part.labelled)
            else:
                self._check_tokens(part.content, part.where)
                self._append(part.content, part.labelled)
            if part.last:
                self._close(isinstance(part.content, str))

    def finish(self) -> dict[str, Any]:
        """What meta.json says of the tokens, after the files are closed."""
        with (self.folder / "offsets.npy").open("wb") as file:
            np.save(file, np.frombuffer(self.offsets, dtype=np.int64), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        return {
            "dtype": self.dtype,
            "tokens": self.tokens,
            "documents": self.documents,
            "empty_documents": self.empty,
            "text_sha256": self.text.hexdigest(),
            "files": {path.name: _file_facts(path) for path in sorted(self.folder.iterdir())},
        }

    def _check_tokens(self, tokens: NDArray[np.int64], where: str) -> None:
        if tokens.size and tokens.max() >= self.tokenizer.vocab_size:
            raise ConfigError(
                f"{where}: token {tokens.max()}; must be from 0 to {self.tokenizer.vocab_size - 1} "
                "(data.tokenizer's vocabulary)"
            )

    def _append(self, tokens: NDArray[np.int64], labelled: bool | NDArray[np.bool_]) -> None:
        if self.label_file is None and tokens.size and not np.all(labelled):
            self._start_labels()
        self.token_file.write(tokens.astype(self.dtype).tobytes())
        if self.label_file is not None:
            self.label_file.write(np.broadcast_to(labelled, tokens.shape).astype(np.uint8).tobytes())
        self.tokens += len(tokens)

    def _start_labels(self) -> None:
        self.label_file = (self.folder / "labels.bin").open("wb")
        for start in range(0, self.tokens, COPY):
            self.label_file.write(b"\1" * min(COPY, self.tokens - start))

    def _close(self, add_eos: bool) -> None:
        if self.tokens == self.offsets[-1]:
            self.empty += 1
            return
        if add_eos and self.tokenizer.eos is not None:
            self._append(np.array([self.tokenizer.eos], dtype=np.int64), True)
        self.offsets.append(self.tokens)


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
