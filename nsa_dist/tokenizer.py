"""Text to tokens: bytes, or a file of the `tokenizers` library."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsa_dist.config import ConfigError, DataConfig

Ints = NDArray[np.int64]


class Tokenizer(Protocol):
    """`eos`: the token that closes a document, or None where documents just end."""

    vocab_size: int
    eos: int | None

    def encode(self, texts: list[str]) -> list[Ints]:
        """The tokens of each text, int64 [tokens], without an end-of-document token."""


class ByteTokenizer:
    """The 256 values of a byte of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eos: int | None = 256

    def encode(self, texts: list[str]) -> list[Ints]:
        """The tokens of each text, int64 [bytes]."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON file.

    The special tokens that its post-processor would put around a text are left out: a document may be
    tokenised in several parts, and `data.eos_token` names what ends it.
    """

    def __init__(self, path: Path, eos_token: str) -> None:
        self._tokenizer: Any = _load(path)
        # Files often keep the truncation of the model they were made for: it would drop text unseen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"data.tokenizer={path}: has no tokens; must have at least one")
        self.vocab_size: int = max(vocabulary.values()) + 1  # identifiers may have holes
        self.eos: int | None = self._tokenizer.token_to_id(eos_token) if eos_token else None
        if eos_token and self.eos is None:
            raise ConfigError(f"data.eos_token={eos_token}: must be a token of data.tokenizer={path}, or empty")

    def encode(self, texts: list[str]) -> list[Ints]:
        """The tokens of each text, int64 [tokens]."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration.

    Raises ConfigError for a missing or unreadable file, or an end-of-document token that it doesn't have.
    """
    path = _tokenizer_file(config)
    return ByteTokenizer() if path is None else FileTokenizer(path, config.eos_token)


def tokenizer_key(config: DataConfig) -> str:
    """What tells this tokenizer from others: its name, or its file's digest with the end-of-document token.

    Doesn't load the tokenizer. Raises ConfigError for a missing file.
    """
    path = _tokenizer_file(config)
    if path is None:
        return "bytes"
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()} {config.eos_token}"


def _tokenizer_file(config: DataConfig) -> Path | None:
    if config.tokenizer == "bytes":
        if config.eos_token:
            raise ConfigError(
                f"data.eos_token={config.eos_token}: must be empty with data.tokenizer=bytes (it has its own)"
            )
        return None
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer={config.tokenizer}: no such file; must be bytes, or a tokenizers JSON file"
        )
    return path


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ConfigError(
            f"data.tokenizer={path}: needs the tokenizers library: pip install 'nsa-dist[data]'"
        ) from None
    try:
        return Library.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer={path}: must be a tokenizers JSON file ({reason})") from None
