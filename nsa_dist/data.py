"""Prepared tokens to packed sequences to a rank's part of them.

A source's training documents, in an order shuffled anew for each epoch, form an endless stream of tokens; it
is cut into sequences of exactly `data.seq_len`. A document cut at the end of a sequence goes on in the next
as a new one; an epoch's end is no cut. What a sequence holds is a function of configuration, prepared data
and the sequence's index alone: to resume is to ask for the next index.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.config import ConfigError, DataConfig, SourceConfig
from nsa_dist.prepare import TokenFile, open_prepared, prepare_source

Ints = NDArray[np.int64]

IGNORED = -100  # label of a token that has none (torch's cross entropy leaves it out)
FEW_DOCUMENTS = 20  # below, the validation share is cut off the last tokens instead
MIXTURE_BLOCK = 4096  # sequences whose sources are counted together


@dataclass(frozen=True)
class Packed:
    """Where one packed sequence's documents lie; made alike by every rank, without reading tokens.

    `cu_seqlens` int64 [documents + 1]: the token at which each document starts, last the sequence's length.
    `file`, `start` int64 [documents]: the token file that each is in, and its first token there.
    """

    cu_seqlens: Ints
    file: Ints
    start: Ints


class Corpus:
    """Packed sequences of training or validation text; made by `open_corpora`.

    `vocab_size`: tokens of the tokenizer. `tokens_per_epoch`: tokens of all sources together. `count`: number
    of sequences, or None where they never end (training). `meta`: tokens, documents and digests of the
    sources; two corpora with one `meta["sha256"]` have the same sequences.
    """

    def __init__(
        self, files: list[TokenFile], streams: list["_Stream"], mixture: "_Mixture", seq_len: int, endless: bool
    ) -> None:
        self._files, self._streams, self._mixture = files, streams, mixture
        self._seq_len = seq_len
        self.vocab_size: int = files[0].meta["vocab_size"]
        self.tokens_per_epoch = sum(stream.tokens for stream in streams)
        self.count = None if endless else max(self.tokens_per_epoch // seq_len, 1)
        self.meta = _meta(files, streams, mixture, seq_len)

    def sequence(self, index: int) -> Packed:
        """Sequence `index` (from 0). Of `data.seq_len` tokens, but for a validation text shorter than that."""
        if index < 0 or (self.count is not None and index >= self.count):
            allowed = "0 or more" if self.count is None else f"from 0 to {self.count - 1}"
            raise IndexError(f"sequence {index}: must be {allowed}")
        source, position = self._mixture.locate(index)
        stream = self._streams[source]
        begin = position * self._seq_len
        end = begin + self._seq_len
        if self.count is not None:
            end = min(end, stream.tokens)
        return stream.packed(begin, end)

    def read(self, packed: Packed, ranges: list[tuple[int, int]]) -> tuple[Ints, Ints]:
        """Tokens and labels (each int64 [sum of end - start]) of the sequence's token ranges [start, end).

        The label is the next token of the same document; IGNORED at a document's last token, and where the
        next token carries no label. Reads these tokens, and the one after each range, only.
        """
        size = sum(end - start for start, end in ranges)
        tokens = np.empty(size, np.int64)
        labels = np.full(size, IGNORED, np.int64)
        at = 0
        for start, end in ranges:
            if not 0 <= start <= end <= packed.cu_seqlens[-1]:
                raise ValueError(f"range [{start}, {end}): must lie in the {packed.cu_seqlens[-1]} tokens")
            for file, first, last, document_end in _pieces(packed, start, end):
                count = last - first
                self._fill(file, first, last, document_end, tokens[at : at + count], labels[at : at + count])
                at += count
        return tokens, labels

    def sequences_in(self, epochs: int) -> int:
        """Sequences in as many tokens as `epochs` epochs of all sources have together, at least 1.

        With weights a source may then have been read more or less often than `epochs` times.
        """
        return max(epochs * self.tokens_per_epoch // self._seq_len, 1)

    def _fill(self, file: int, first: int, last: int, document_end: int, tokens: Ints, labels: Ints) -> None:
        source = self._files[file]
        target = min(last + 1, document_end)  # the token after the last one is its label, inside the document
        read = source.tokens[first:target]
        tokens[:] = read[: last - first]
        labels[: target - first - 1] = read[1:]
        if source.labels is not None:
            labels[: target - first - 1][source.labels[first + 1 : target] == 0] = IGNORED


def prepare_all(config: DataConfig, say: Callable[[str], None]) -> tuple[Corpus, Corpus | None]:
    """Prepares every source that isn't yet; quick where all are. `say` gets lines of progress.

    Returns what `open_corpora` does. Raises ConfigError for what can't be read or is damaged, or as that does.
    """
    names = [source.path for source in _sources(config)]
    if isinstance(config.validation, str):
        names.append(config.validation)
    for name in dict.fromkeys(names):
        prepare_source(name, config, say)
    return open_corpora(config)


def open_corpora(config: DataConfig) -> tuple[Corpus, Corpus | None]:
    """Training and validation sequences of prepared sources; opens memory maps only.

    Validation sequences keep the documents' order, source after source; what is left at the end, less than a
    sequence, is dropped (unless it is all there is: then the one sequence is shorter).
    Raises ConfigError for a source that isn't prepared or is damaged, and for a bad validation share.
    """
    sources = _sources(config)
    files = [open_prepared(source.path, config) for source in sources]
    share = 0.0 if isinstance(config.validation, str) else float(config.validation)
    parts = [_split(file.offsets, share) for file in files]
    streams = []
    for i, (training, _) in enumerate(parts):
        streams.append(_Stream([(i, *training)], (config.shuffle_seed, i)))
        if streams[i].tokens < 2:
            raise ConfigError(
                f"data.validation={share}: leaves {streams[i].tokens} tokens of '{sources[i].path}' to train on; "
                "must leave at least 2"
            )
    mixture = _Mixture([source.weight for source in sources], config.shuffle_seed)
    corpus = Corpus(files, streams, mixture, config.seq_len, endless=True)
    held_out = [(i, *held) for i, (_, held) in enumerate(parts)]
    if isinstance(config.validation, str):
        files = [open_prepared(config.validation, config)]
        held_out = [(0, files[0].offsets[:-1], files[0].offsets[1:])]
    elif share == 0:
        return corpus, None
    stream = _Stream(held_out, None)
    if stream.tokens < 2:
        raise ConfigError(
            f"data.validation={share}: holds out {stream.tokens} tokens; must be 0, or at least 2 tokens"
        )
    return corpus, Corpus(files, [stream], _Mixture([1.0], 0), config.seq_len, endless=False)


def _sources(config: DataConfig) -> list[SourceConfig]:
    return config.sources or [SourceConfig(config.source)]


def _split(offsets: Ints, share: float) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
    """Starts and ends of the training documents, and of those held out.

    Document i is held out where floor((i + 1) * share) > floor(i * share): evenly spread. Where documents are
    few, or the share is less than one, the last tokens are held out, and the document there is cut.
    """
    starts, ends = offsets[:-1], offsets[1:]
    held = np.diff(np.floor(np.arange(len(offsets)) * share)) > 0
    if len(starts) >= FEW_DOCUMENTS and held.any():
        return (starts[~held], ends[~held]), (starts[held], ends[held])
    cut = int(offsets[-1]) - int(int(offsets[-1]) * share)
    training, last = starts < cut, ends > cut
    return (
        (starts[training], np.minimum(ends[training], cut)),
        (np.maximum(starts[last], cut), ends[last]),
    )


def _pieces(packed: Packed, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each document in [start, end): its file, first and last + 1 token there, and the document's end."""
    cu = packed.cu_seqlens
    document = int(np.searchsorted(cu, start, side="right")) - 1
    while start < end:
        shift = int(packed.start[document]) - int(cu[document])  # from places in the sequence to the file's
        stop = int(cu[document + 1])
        yield int(packed.file[document]), start + shift, min(end, stop) + shift, stop + shift
        start, document = stop, document + 1


class _Stream:
    """Documents laid one after another, epoch after epoch.

    `parts`: of each token file its number, and the documents' starts and ends [documents]. `seed`: the order
    of each epoch is shuffled by it and the epoch's number; None: the order is kept.
    """

    def __init__(self, parts: list[tuple[int, Ints, Ints]], seed: tuple[int, int] | None) -> None:
        self.file = np.concatenate([np.full(len(starts), file, np.int64) for file, starts, _ in parts])
        self.start = np.concatenate([starts for _, starts, _ in parts])
        self.length = np.concatenate([ends - starts for _, starts, ends in parts])
        self.tokens = int(self.length.sum())
        self._seed = seed
        # A sequence needs the epoch that it lies in, or two; millions of documents take a while to shuffle.
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def packed(self, begin: int, end: int) -> Packed:
        """The documents, or parts of them, in the stream's tokens [begin, end)."""
        cuts = [self._cut(epoch, begin, end) for epoch in range(begin // self.tokens, -(-end // self.tokens))]
        documents = np.concatenate([cut[0] for cut in cuts])
        skipped = np.concatenate([cut[1] for cut in cuts])
        lengths = np.concatenate([cut[2] for cut in cuts])
        cu_seqlens = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return Packed(cu_seqlens, self.file[documents], self.start[documents] + skipped)

    def _cut(self, epoch: int, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
        """Documents of an epoch in [begin, end): number, tokens skipped at the start, tokens kept."""
        order, cu = self._epoch(epoch)
        begin = max(begin - epoch * self.tokens, 0)
        end = min(end - epoch * self.tokens, self.tokens)
        first = int(np.searchsorted(cu, begin, side="right")) - 1
        last = int(np.searchsorted(cu, end, side="left"))
        skipped = np.maximum(begin - cu[first:last], 0)
        kept = np.minimum(cu[first + 1 : last + 1], end) - cu[first:last] - skipped
        return order[first:last], skipped, kept

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints]:
        """The documents' order in an epoch, and where each starts: int64 [documents], [documents + 1]."""
        order = np.arange(len(self.length))
        if self._seed is not None:
            # Sorting raw bits: numpy keeps those alike in all versions, `permutation` it does not.
            bits = np.random.PCG64(np.random.SeedSequence((*self._seed, epoch)))
            order = np.argsort(bits.random_raw(len(order)), kind="stable")
        return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.length[order])])


class _Mixture:
    """Which source each sequence comes from: shares as near to the weights as a fixed order allows.

    Sequence i goes where frac(offset + i * golden ratio) falls among the cumulated weights; that sequence
    fills the interval evenly and needs no state (Kronecker's; its discrepancy grows as the logarithm: tried
    on up to a million sequences, a source's count stays within 5 of its share).
    """

    GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # (sqrt(5) - 1) / 2, in units of 2^-64

    def __init__(self, weights: list[float], seed: int) -> None:
        self.weights = weights
        self._edges = np.cumsum(weights)[:-1] / np.sum(weights)
        self._offset = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self._counts = {0: np.zeros(len(weights), np.int64)}  # of each source before each block
        self._block = lru_cache(maxsize=2)(self._sources)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of sequence `index`, and how many sequences before it came from there."""
        block, place = divmod(index, MIXTURE_BLOCK)
        for known in range(len(self._counts) - 1, block):
            here = np.bincount(self._block(known), minlength=len(self.weights))
            self._counts[known + 1] = self._counts[known] + here
        sources = self._block(block)
        source = int(sources[place])
        return source, int(self._counts[block][source] + np.count_nonzero(sources[:place] == source))

    def _sources(self, block: int) -> Ints:
        indices = np.arange(block * MIXTURE_BLOCK, (block + 1) * MIXTURE_BLOCK, dtype=np.uint64)
        turns = self._offset + indices * self.GOLDEN  # modulo 2^64
        fractions = (turns >> np.uint64(11)) / float(1 << 53)
        return np.searchsorted(self._edges, fractions, side="right")


def _meta(files: list[TokenFile], streams: list[_Stream], mixture: _Mixture, seq_len: int) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([seq_len, mixture.weights, files[0].meta["vocab_size"]]).encode())
    for file in files:
        digest.update(json.dumps(file.meta["files"], sort_keys=True).encode())
    for stream in streams:
        digest.update(json.dumps(stream._seed).encode())
        for documents in (stream.file, stream.start, stream.length):
            digest.update(documents.tobytes())
    kept = ("source", "python", "skipped_files", "tokenizer", "tokens", "documents", "text_sha256", "files")
    return {
        "sha256": digest.hexdigest(),
        "tokens": sum(stream.tokens for stream in streams),
        "documents": sum(len(stream.length) for stream in streams),
        "sources": [{name: file.meta[name] for name in kept} for file in files],
    }
