"""Tables of a packed sequence against brute force over tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_dist.kernels.packing import Packing, overlap_weights
from nsa_dist.kernels.spec import NSASpec


@st.composite
def specs(draw: st.DrawFn) -> NSASpec:
    stride = draw(st.integers(1, 8))
    return NSASpec(
        compress_block=stride * draw(st.integers(1, 4)),
        compress_stride=stride,
        select_block=stride * draw(st.integers(1, 4)),
    )


lengths = st.lists(st.integers(1, 70), max_size=5)


def starts(document_lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *document_lengths])


@settings(max_examples=100, deadline=None)
@given(specs(), lengths)
def test_compressed_tokens_stay_inside_documents(spec: NSASpec, document_lengths: list[int]) -> None:
    packing = Packing(starts(document_lengths), spec)
    l, d, expected = spec.compress_block, spec.compress_stride, []
    for first, length in zip(starts(document_lengths), document_lengths, strict=False):
        expected.append([first + s for s in range(0, length, d) if s + l <= length])
    assert packing.cmp_start.tolist() == [s for document in expected for s in document]
    assert np.diff(packing.cmp_cu).tolist() == [len(document) for document in expected]
    assert packing.compressed == len(packing.cmp_start)


@settings(max_examples=100, deadline=None)
@given(specs(), lengths)
def test_blocks_partition_the_tokens(spec: NSASpec, document_lengths: list[int]) -> None:
    packing = Packing(starts(document_lengths), spec)
    covered = [
        (token, block)
        for block in range(packing.blocks)
        for token in range(packing.blk_start[block], packing.blk_end[block])
    ]
    tokens = np.arange(sum(document_lengths))
    assert [token for token, _ in covered] == tokens.tolist()
    assert [block for _, block in covered] == packing.block(tokens).tolist()
    for block in range(packing.blocks):
        inside = packing.document(np.arange(packing.blk_start[block], packing.blk_end[block]))
        assert len(set(inside.tolist())) == 1
        assert packing.position(packing.blk_start[block : block + 1])[0] % spec.select_block == 0


@settings(max_examples=100, deadline=None)
@given(specs(), lengths)
def test_a_query_sees_the_compressed_tokens_that_end_by_it(spec: NSASpec, document_lengths: list[int]) -> None:
    packing = Packing(starts(document_lengths), spec)
    tokens = np.arange(packing.tokens)
    document = np.repeat(np.arange(len(document_lengths)), document_lengths)
    assert packing.document(tokens).tolist() == document.tolist()
    first, end = packing.visible_compressed(tokens)
    for t in tokens:
        seen = [
            i
            for i, start in enumerate(packing.cmp_start)
            if document[start] == document[t] and start + spec.compress_block - 1 <= t
        ]
        assert (list(range(first[t], end[t])), end[t] - first[t]) == (seen, len(seen))


@given(specs())
def test_overlap_weights_count_shared_tokens(spec: NSASpec) -> None:
    l, d, lp, block = spec.compress_block, spec.compress_stride, spec.select_block, 9
    shared = {
        i: len(set(range(i * d, i * d + l)) & set(range(block * lp, (block + 1) * lp))) / d
        for i in range((block + 2) * lp // d)
    }
    first = block * lp // d - (l // d - 1)
    found = dict(enumerate(overlap_weights(spec), first))
    assert found == {i: weight for i, weight in shared.items() if weight}


def test_overlap_weights_of_the_paper() -> None:
    assert overlap_weights(NSASpec()) == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("cu", [[1, 4], [0, 4, 4], [0, 5, 3], [], [[0, 3]]])
def test_wrong_cu_seqlens_are_refused(cu: list) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens=.*must be \[documents \+ 1\]"):
        Packing(np.array(cu, dtype=np.int64), NSASpec())
