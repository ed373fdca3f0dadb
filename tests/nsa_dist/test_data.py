"""Text to token files to packed sequences: nothing lost, nothing twice, every rank reads the same."""

import itertools
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_dist import prepare, sources
from nsa_dist.config import ConfigError, DataConfig, SourceConfig, load_config
from nsa_dist.data import IGNORED, Corpus, Packed, open_corpora, prepare_all
from nsa_dist.prepare import open_folder, prepare_source

EOS = 256


def quiet(_: str) -> None:
    pass


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make_config(folder: Path, source: str, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"validation": 0, "seq_len": 16} | changes
    return DataConfig(source=source, cache_dir=str(folder / "cache"), **values)


def corpora(config: DataConfig) -> tuple[Corpus, Corpus | None]:
    prepare_all(config, quiet)
    return open_corpora(config)


def read_all(corpus: Corpus, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    return corpus.read(packed, [(0, int(packed.cu_seqlens[-1]))])


def stream(corpus: Corpus, begin: int, end: int, seq_len: int) -> list[int]:
    """Tokens [begin, end) of the corpus's sequences laid one after another."""
    rows = [read_all(corpus, corpus.sequence(i))[0] for i in range(begin // seq_len, (end - 1) // seq_len + 1)]
    return np.concatenate(rows)[begin % seq_len :][: end - begin].tolist()


def documents(tokens: list[int]) -> list[tuple[int, ...]]:
    """Tokens cut after each end of a document; what follows the last is a document too."""
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [tuple(document) for document in found if document]


def expect_error(words: str, action: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=20, max_size=50),
    seq_len=st.integers(1, 150),
    share=st.sampled_from([0, 0.05, 0.1, 1 / 3, 0.5]),
)
def test_an_epoch_holds_each_training_document_once(sizes: list[int], seq_len: int, share: float) -> None:
    texts = [f"{i}:".ljust(size + 3, "x") for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as name:
        source = jsonl(Path(name) / "a.jsonl", [{"text": text} for text in texts])
        config = make_config(Path(name), source, seq_len=seq_len, validation=share)
        training, validation = corpora(config)
        epochs = [
            documents(stream(training, e * training.tokens_per_epoch, (e + 1) * training.tokens_per_epoch, seq_len))
            for e in range(3)
        ]
        held = [i for i in range(len(texts)) if int((i + 1) * share) > int(i * share)]
        kept = [i for i in range(len(texts)) if i not in held]
        as_tokens = [(*text.encode(), EOS) for text in texts]
        assert all(sorted(epoch) == sorted(as_tokens[i] for i in kept) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert (validation is None) == (share == 0)
        if validation is not None:
            whole = [token for i in held for token in as_tokens[i]]
            usable = len(whole) // seq_len * seq_len or len(whole)
            assert stream(validation, 0, usable, seq_len) == whole[:usable]
            assert validation.count == max(len(whole) // seq_len, 1)
            with pytest.raises(IndexError):
                validation.sequence(validation.count)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ranges_labels_and_documents_of_a_sequence(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    seq_len = data.draw(st.integers(2, 120))
    masks = [data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in sizes]
    first = np.concatenate([[0], np.cumsum(sizes)])
    # Each token tells its place in the corpus, so that documents and masks can be told from tokens alone.
    records = [{"tokens": list(range(first[i], first[i + 1])), "labels": masks[i]} for i in range(len(sizes))]
    if first[-1] < 2 or first[-1] > 257:
        return
    with tempfile.TemporaryDirectory() as name:
        corpus, _ = corpora(make_config(Path(name), jsonl(Path(name) / "a.jsonl", records), seq_len=seq_len))
        packed = corpus.sequence(data.draw(st.integers(0, 9)))
        tokens, labels = read_all(corpus, packed)
        flat = np.concatenate(masks)
        ends = set((first[1:] - 1).tolist())
        cut = [i + 1 for i in range(seq_len) if i == seq_len - 1 or tokens[i] in ends]
        assert packed.cu_seqlens.tolist() == [0, *cut]
        expected = [tokens[i + 1] if i + 1 not in cut and flat[tokens[i + 1]] else IGNORED for i in range(seq_len)]
        assert labels.tolist() == expected
        edges = sorted(data.draw(st.lists(st.integers(0, seq_len), min_size=2, max_size=8)))
        ranges = data.draw(st.permutations(list(itertools.pairwise(edges))))
        part = corpus.read(packed, ranges)
        assert part[0].tolist() == [t for a, b in ranges for t in tokens[a:b].tolist()]
        assert part[1].tolist() == [t for a, b in ranges for t in labels[a:b].tolist()]


def test_read_refuses_a_range_outside(tmp_path: Path) -> None:
    corpus, _ = corpora(make_config(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])))
    with pytest.raises(ValueError, match="must lie in the 16 tokens"):
        corpus.read(corpus.sequence(0), [(8, 17)])


def test_few_documents_hold_out_the_last_tokens(tmp_path: Path) -> None:
    text = "".join(chr(33 + i % 90) for i in range(199))
    (tmp_path / "a.txt").write_text(text)
    training, validation = corpora(make_config(tmp_path, str(tmp_path / "a.txt"), validation=0.1, seq_len=64))
    whole = [*text.encode(), EOS]
    assert stream(training, 0, training.tokens_per_epoch, 64) == whole[:180]
    assert validation is not None and validation.count == 1
    packed = validation.sequence(0)  # the held-out text is shorter than a sequence
    assert packed.cu_seqlens.tolist() == [0, 20]
    assert read_all(validation, packed)[0].tolist() == whole[180:]


def test_order_follows_the_seed_alone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(50)])
    config = make_config(tmp_path, source, shuffle_seed=3)
    one, other = corpora(config)[0], open_corpora(config)[0]
    late = read_all(one, one.sequence(37))[0].tolist()
    assert late == read_all(other, other.sequence(37))[0].tolist()  # first asked for, or after others
    assert one.meta == other.meta
    config.shuffle_seed = 4
    changed, _ = open_corpora(config)
    assert stream(changed, 0, 160, 16) != stream(one, 0, 160, 16)
    assert changed.meta["sha256"] != one.meta["sha256"]
    assert one.sequences_in(3) == 3 * one.tokens_per_epoch // 16


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.5, 0.5), (9.0, 1.0)])
def test_sources_come_by_weight_and_each_in_its_own_order(tmp_path: Path, weights: tuple[float, float]) -> None:
    paths = [jsonl(tmp_path / f"{n}.jsonl", [{"text": n * 15 + str(i)} for i in range(9)]) for n in "ab"]
    config = make_config(tmp_path, "", seq_len=17)  # a document: 15 letters, a digit, its end
    config.sources = [SourceConfig(path, weight) for path, weight in zip(paths, weights, strict=True)]
    corpus, _ = corpora(config)
    texts = [bytes(read_all(corpus, corpus.sequence(i))[0][:16].tolist()).decode() for i in range(5000)]
    from_b = np.cumsum([text[0] == "b" for text in texts])
    expected = np.arange(1, 5001) * weights[1] / sum(weights)
    assert np.abs(from_b - expected).max() < 5  # drawn at random: tens
    for name in "ab":
        mine = [text for text in texts if text[0] == name]
        assert all(len(set(mine[i : i + 9])) == 9 for i in range(0, len(mine) - 9, 9))
    other, _ = open_corpora(config)  # counts of earlier sequences don't depend on having asked for them
    assert bytes(read_all(other, other.sequence(4999))[0][:16].tolist()).decode() == texts[4999]


def test_prompts_carry_no_labels(tmp_path: Path) -> None:
    records = [{"text": "plain"}, {"prompt": "ask", "completion": "yes"}]
    folder = prepare_source(
        jsonl(tmp_path / "a.jsonl", records), make_config(tmp_path, str(tmp_path / "a.jsonl")), quiet
    )
    file = open_folder(folder)
    assert file.tokens.tolist() == [*b"plain", EOS, *b"askyes", EOS]
    assert file.labels is not None and file.labels.tolist() == [1] * 6 + [0] * 3 + [1] * 4
    assert file.offsets.tolist() == [0, 6, 13]


def test_parquet_reads_as_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"row {i} ü" for i in range(700)]
    parquet.write_table(pyarrow.table({"text": texts, "label": [1] * 700}), tmp_path / "a.parquet")
    pairs = {"prompt": ["ask"], "completion": ["yes"]}
    parquet.write_table(pyarrow.table(pairs), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 is all there is")
    config = make_config(tmp_path, "")
    file = open_folder(prepare_source(str(tmp_path / "a.parquet"), config, quiet))
    assert bytes(file.tokens[file.tokens < EOS].tolist()).decode() == "".join(texts)
    assert file.meta["documents"] == 700
    masked = open_folder(prepare_source(str(tmp_path / "b.parquet"), config, quiet))
    assert masked.labels is not None and masked.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for name, words in {"c": "columns body; must have text", "d": "row 2: text is NoneType", "e": "Parquet"}.items():
        expect_error(words, partial(prepare_source, str(tmp_path / f"{name}.parquet"), config, quiet))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    config = make_config(tmp_path, str(tmp_path / "a.parquet"))
    expect_error(r"nsa-dist\[data\]", partial(prepare_all, config, quiet))


def write_tokenizer(path: Path, vocabulary: dict[str, int]) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(("last", "dtype"), [(4, "uint16"), (70000, "uint32")])
def test_tokenizers_file(tmp_path: Path, last: int, dtype: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "t.json", {"?": 0, "the": 1, "cat": 2, "end": 3, "sat": last})
    source = jsonl(tmp_path / "a.jsonl", [{"text": "the cat sat the cat"}, {"text": ""}, {"text": "dog"}])
    config = make_config(tmp_path, source, tokenizer=tokenizer, eos_token="end")
    file = open_folder(prepare_source(source, config, quiet))
    # longer than the truncation that the file asks for; a document without text is left out
    assert file.tokens.tolist() == [1, 2, last, 1, 2, 3, 0, 3]
    assert file.tokens.dtype == dtype and file.meta["empty_documents"] == 1
    assert open_corpora(config)[0].vocab_size == last + 1
    config.eos_token = ""
    assert open_folder(prepare_source(source, config, quiet)).tokens.tolist() == [1, 2, last, 1, 2, 0]


def test_tokenizer_errors(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    tokenizer = write_tokenizer(tmp_path / "t.json", {"?": 0, "the": 1})
    for words, changes in {
        "data.eos_token=stop": {"tokenizer": tokenizer, "eos_token": "stop"},
        "data.eos_token=x: must be empty": {"eos_token": "x"},
        "no such file": {"tokenizer": str(tmp_path / "none.json")},
        "must be a tokenizers JSON file": {"tokenizer": source},
    }.items():
        expect_error(words, partial(prepare_all, make_config(tmp_path, source, **changes), quiet))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('["text"]', "line 2: has no known field"),
        ('{"prompt": "a"}', "line 2: has prompt; must be"),
        ('{"text": "a", "labels": [1]}', "line 2: has text, labels; must be"),
        ('{"text": 5}', "line 2: text is int; must be a string"),
        ('{"text": "\\ud800"}', "line 2: text has half a surrogate"),
        ('{"tokens": [1, 2], "labels": [1]}', "line 2: 1 labels; must be as many as tokens: 2"),
        ('{"tokens": [1, 2], "labels": [1, 2]}', "line 2: labels has 2; must be integers from 0 to 1"),
        ('{"tokens": [1, -1]}', "line 2: tokens has -1"),
        ('{"tokens": [1, true]}', "line 2: tokens has True"),
        ('{"tokens": [1, 257]}', "line 2: token 257; must be from 0 to 256"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "url": "ignored"}\n' + line + "\n")
    config = make_config(tmp_path, str(path))
    expect_error(f"a.jsonl, {words}", partial(prepare_all, config, quiet))
    assert list((tmp_path / "cache").iterdir()) == []


def test_source_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    jsonl(tmp_path / "one.jsonl", [{"tokens": [7]}])
    for name, words in {
        "missing.txt": "no such file or folder",
        "empty.txt": "0 tokens; must have at least 2",
        "one.jsonl": "1 tokens; must have at least 2",
        "folder": "no files in this folder",
        "a.jsonl.gz": "unsupported file; must be text, .jsonl or .parquet",
        "latin.jsonl": "not UTF-8 at byte 24",
    }.items():
        config = make_config(tmp_path, str(tmp_path / name))
        expect_error(f"{name}': {words}", partial(prepare_all, config, quiet))
    expect_error("must be a path, or", lambda: prepare_all(make_config(tmp_path, "builtin:no"), quiet))
    expect_error("weight=0", lambda: load_config(None, [f"data.sources=[{{path: {tmp_path}, weight: 0}}]"]))


def test_validation_errors(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"tokens": [1, 2, 3]}])
    for value, words in {
        0.1: "holds out 0 tokens",
        0.5: "holds out 1 tokens",
        0.9: "leaves 1 tokens of",
        "gone.txt": "gone.txt': no such file",
    }.items():
        config = make_config(tmp_path, source, validation=value)
        expect_error(words, partial(prepare_all, config, quiet))


def test_validation_from_its_own_source(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"training {i}"} for i in range(30)])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "first"}, {"text": "second"}])
    training, validation = corpora(make_config(tmp_path, source, validation=other, seq_len=5))
    assert training.meta["documents"] == 30
    assert validation is not None and validation.count == 2  # 13 tokens, the last 3 dropped
    assert stream(validation, 0, 10, 5) == [*b"first", EOS, *b"seco"]


def test_folder_reads_all_files_in_order(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "b" / ".git").mkdir(parents=True)
    (data / "b" / ".git" / "config").write_text("hidden")
    (data / "b" / "c.md").write_text("2")
    (data / "b" / "up").symlink_to(data)
    (data / "z.txt").write_text("3")
    jsonl(data / "a.jsonl", [{"text": "0"}, {"text": "1"}])
    config = make_config(tmp_path, str(data))
    assert documents(open_folder(prepare_source(str(data), config, quiet)).tokens.tolist()) == [
        (ord(digit), EOS) for digit in "0123"
    ]


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "a\nb", "\n", " ", "ü", "😀"]), min_size=40, max_size=150),
    part=st.integers(1, 20),
    bad=st.integers(0, 200),
)
def test_a_long_text_is_read_in_parts(words: list[str], part: int, bad: int) -> None:
    text = "".join(words)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART", part)
        patch.setattr(prepare, "BATCH", 3 * part)
        path = Path(name) / "a.txt"
        path.write_bytes(text.encode())
        config = make_config(Path(name), str(path))
        assert open_folder(prepare_source(str(path), config, quiet)).tokens.tolist() == [*text.encode(), EOS]
        kept = text[:bad].encode()
        path.write_bytes(kept + b"\xff" + text[bad:].encode())
        expect_error(f"not UTF-8 at byte {len(kept)};", lambda: prepare_source(str(path), config, quiet))


def test_prepared_once_and_again_when_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    config = make_config(tmp_path, str(path))
    expect_error("not prepared", partial(open_corpora, config))
    first = prepare_source(str(path), config, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write", None)  # prepared: nothing is written
        assert prepare_source(str(path), config, quiet) == first
    path.write_text("now longer")
    expect_error("not prepared, or changed since", partial(open_corpora, config))
    second = prepare_source(str(path), config, quiet)
    assert bytes(open_folder(second).tokens[:-1].tolist()) == b"now longer"


def test_source_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    write = prepare._write

    def write_then_change(*arguments: Any) -> None:
        write(*arguments)
        path.write_text("now longer")

    monkeypatch.setattr(prepare, "_write", write_then_change)
    config = make_config(tmp_path, str(path))
    expect_error("changed while it was read", partial(prepare_all, config, quiet))
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_that_prepare_at_once_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written all before the first puts its folder in place."""
    source = jsonl(tmp_path / "a.jsonl", [{"text": "some text"}])
    config = make_config(tmp_path, source)
    barrier, place = threading.Barrier(2), prepare._put_in_place

    def meet_then_place(*arguments: Any) -> None:
        barrier.wait(60)
        place(*arguments)

    monkeypatch.setattr(prepare, "_put_in_place", meet_then_place)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(prepare_source(source, config, quiet))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert list((tmp_path / "cache").iterdir()) == [folders[0]]
    assert bytes(open_folder(folders[0]).tokens[:9].tolist()) == b"some text"


def test_two_processes_prepare_at_once(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " * 500} for i in range(3000)])
    code = (
        "import sys; from nsa_dist.config import DataConfig; from nsa_dist.data import open_corpora, prepare_all\n"
        "config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2])\n"
        "prepare_all(config, print); print(open_corpora(config)[0].meta['sha256'])"
    )
    command = [sys.executable, "-c", code, source, str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_interrupted_preparation_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "some text"}] * 3)
    config = make_config(tmp_path, source)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare._Writer, "finish", interrupt)
        prepare_source(source, config, quiet)
    assert list((tmp_path / "cache").iterdir()) == []
    # What a kill leaves: ignored, and removed when nobody has written to it for long.
    for name in ("old", "new"):
        left = tmp_path / "cache" / f".unfinished-{name}"
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"12")
        if name == "old":
            os.utime(left / "tokens.bin", (0, 0))
            os.utime(left, (0, 0))
    folder = prepare_source(source, config, quiet)
    assert open_folder(folder).meta["documents"] == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [".unfinished-new", folder.name]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled_offsets(path: Path) -> None:
    meta = json.loads((path.parent / "meta.json").read_text())
    path.write_bytes(pickle.dumps(Touch(path.parent / "executed")))
    meta["files"]["offsets.npy"]["bytes"] = path.stat().st_size
    (path.parent / "meta.json").write_text(json.dumps(meta))


def wrong_offsets(path: Path) -> None:
    offsets = np.load(path)
    offsets[1] = offsets[2]
    np.save(path, offsets)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", shorten),
        ("tokens.bin", Path.unlink),
        ("labels.bin", shorten),
        ("offsets.npy", shorten),
        ("offsets.npy", pickled_offsets),
        ("offsets.npy", wrong_offsets),
        ("meta.json", shorten),
        ("meta.json", lambda path: path.write_text("[]")),
    ],
)
def test_damaged_folder_is_named(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "ask", "completion": "yes"}] * 3)
    config = make_config(tmp_path, source)
    folder = prepare_source(source, config, quiet)
    damage(folder / name)
    expect_error(f"'{folder}': damaged", partial(open_corpora, config))
    expect_error(f"'{folder}': damaged", partial(prepare_all, config, quiet))
    assert not (folder / "executed").exists()  # a pickle is refused, not loaded


def test_library_of_python(tmp_path: Path) -> None:
    said: list[str] = []
    config = DataConfig(cache_dir=str(tmp_path))
    prepare_all(config, said.append)
    training, validation = open_corpora(config)
    source = training.meta["sources"][0]
    assert source["python"] == platform.python_version() and len(source["text_sha256"]) == 64
    assert f"{source['tokens']:,} tokens" in said[-1]
    assert training.vocab_size == 257
    assert validation is not None
    assert training.meta["documents"] + validation.meta["documents"] == source["documents"]
    files = [path.as_posix() for path in sources.find_source(sources.LIBRARY).files]
    assert any(path.endswith("/json/decoder.py") for path in files)
    assert not any("/test/" in path or "/tests/" in path or "/site-packages/" in path for path in files)


def test_library_file_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# \xe4")
    (tmp_path / "b.py").write_text("pass")
    library = sources.Source("library", tmp_path, sorted(tmp_path.iterdir()), "3")
    skipped: list[str] = []
    assert [part.content for part in library.parts(skipped)] == ["pass"]
    assert skipped == ["a.py"]
