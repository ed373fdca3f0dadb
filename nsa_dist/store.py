"""Where checkpoints are: a local folder, or a place at any fsspec URL (s3://, gs://, sftp://, …).

A checkpoint is a folder that is whole or not seen. On a local disk it is written under another name and renamed.
An object store has no rename: there a folder counts once it holds its last file, which is written last and deleted
first.
"""

import difflib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_dist.errors import ConfigError


class StoreError(ConfigError):
    """A place that can't be reached just now, or doesn't let us; in one line."""

    bad_input = False  # an outage passes: the run is started again


@dataclass(frozen=True)
class Remote:
    """A file or folder at an fsspec URL, with those of pathlib.Path's methods that checkpoints need."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(self.url.rpartition("/")[0])

    def resolve(self) -> "Remote":
        return self

    def is_dir(self) -> bool:
        return bool(listing(self))

    def open(self, mode: str) -> Any:
        with _told(self):
            fs, path = self.at()
            return fs.open(path, mode)

    def read_bytes(self) -> bytes:
        with _told(self):
            fs, path = self.at()
            return fs.cat_file(path)

    def at(self) -> tuple[Any, str]:
        """The file system, and the path there."""
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(self.url, use_listings_cache=False)  # others write there, too
        return fs, str(path)


Place = Path | Remote


def place(text: str | Path | Remote) -> Place:
    """A local path, or the place of a URL."""
    if isinstance(text, str) and "://" in text:
        return Remote(text.rstrip("/"))
    return text if isinstance(text, Remote) else Path(text)


def check_known(key: str, text: str) -> None:
    """Raises ConfigError for a URL whose protocol fsspec doesn't know, or whose package isn't there."""
    protocol, url, _ = text.partition("://")
    if not url:
        return
    if protocol == "memory":
        raise ConfigError(f"{key}={text}: must be a place that outlives the process")
    from fsspec import available_protocols, get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(f"{key}={text}: {protocol}:// needs a package that isn't there ({error})") from None
    except ValueError:
        near = difflib.get_close_matches(protocol, available_protocols(), 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{key}={text}: must be a folder or a URL of a protocol that fsspec knows{hint}") from None


def check_writable(folder: Place) -> None:
    """Raises ConfigError with the reason where a file can't be written and deleted there."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        make(folder)
        write(probe, b"")
        delete(probe)
    except (OSError, StoreError) as error:
        raise ConfigError(f"run.store={folder}: must be a place that can be written ({error})") from None


def listing(folder: Place) -> dict[str, int | None]:
    """Names in a folder with their sizes in bytes, None for folders; nothing where there is no such folder."""
    if isinstance(folder, Path):
        if not folder.is_dir():
            return {}
        return {path.name: None if path.is_dir() else path.stat().st_size for path in folder.iterdir()}
    with _told(folder):
        fs, path = folder.at()
        try:
            rows = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        # Some list the folder itself.
        rows = [row for row in rows if row["name"].strip("/") != path.strip("/")]
        return {_last(row["name"]): None if row["type"] == "directory" else int(row["size"]) for row in rows}


def make(folder: Place) -> None:
    """With its parents, where it isn't there."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        return
    with _told(folder):
        fs, path = folder.at()
        fs.makedirs(path, exist_ok=True)


def write(file: Place, content: bytes) -> None:
    """On a local disk it is there to stay on return."""
    if isinstance(file, Path):
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return
    with _told(file):
        fs, path = file.at()
        fs.pipe_file(path, content)


def rename(file: Place, name: str) -> None:
    """Within its folder."""
    if isinstance(file, Path):
        file.rename(file.with_name(name))
        return
    with _told(file):
        fs, path = file.at()
        fs.mv(path, (file.parent / name).at()[1])


def delete(path: Place) -> None:
    """A file, or a folder with all that is in it."""
    if isinstance(path, Path):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return
    with _told(path):
        fs, there = path.at()
        try:
            fs.rm(there, recursive=True)
        except FileNotFoundError:
            return


# A folder that is whole or not seen; `last`: the name of the file that makes it whole.


def seen(folder: Place, last: str) -> bool:
    """Whether a folder counts."""
    return isinstance(folder, Path) or last in listing(folder)


def begin(final: Place, last: str) -> Place:
    """An empty folder in which to write what will be `final`."""
    temp = final.with_name(f".{final.name}.tmp") if isinstance(final, Path) else final
    withdraw(temp, last)
    make(temp)
    return temp


def publish(temp: Place, final: Place, last: str, content: bytes) -> None:
    """Writes the last file; from then on `final` is seen, in place of what was there."""
    write(temp / last, content)
    if isinstance(temp, Path) and isinstance(final, Path):
        _sync(temp)
        withdraw(final, last)
        temp.rename(final)
        _sync(final.parent)


def withdraw(folder: Place, last: str) -> None:
    """Deletes a folder; it is hidden first, so that none is ever seen half-deleted."""
    if isinstance(folder, Remote):
        delete(folder / last)
        delete(folder)
    elif folder.is_dir():
        hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.old.tmp")
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)


def clear(folder: Place, names: str, last: str) -> None:
    """Makes the folder, and deletes what was left half-written or half-deleted of those `names` begin."""
    make(folder)
    for name in listing(folder):
        half = name.endswith(".tmp") if isinstance(folder, Path) else not seen(folder / name, last)
        if half and name.lstrip(".").startswith(names):
            delete(folder / name)


@contextmanager
def _told(at: Remote) -> Iterator[None]:
    """What fsspec's many packages raise, in one line that names the place."""
    try:
        yield
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(f"{at}: {words}") from error


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
