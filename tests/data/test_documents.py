"""How rows are cut from documents; the arrays of small cases stand here in full."""

import numpy as np
import pytest

from lm2_jax.data.documents import DocumentFields, DocumentSource, MemoryDocuments, Ordered, Packed, content_hash
from lm2_jax.data.draws import draw, shuffled
from lm2_jax.errors import UserError

EOS, PAD = 1, 0


def source(
    lengths: list[int], segment_tokens: int, seed: int = 0, held_out_fraction: float = 0.0, **fields
) -> DocumentSource:
    """Document d holds the tokens 100 d, 100 d + 1, ..."""
    documents = MemoryDocuments((100 * d + np.arange(n) for d, n in enumerate(lengths, start=1)), EOS, PAD)
    settings = DocumentFields(held_out_fraction=held_out_fraction, **fields)
    return DocumentSource(documents, segment_tokens, settings, seed, "toy")


def test_packed_row_in_full():
    # Three documents of 3, 5 and 4 tokens fill three segments of four; seed 3 puts them in this order.
    example = source([3, 5, 4], 4, seed=3).example(step=0, row=0, rows=1, segments=3)
    np.testing.assert_array_equal(example.tokens, [300, 301, 302, 303, 200, 201, 202, 203, 204, 100, 101, 102])
    np.testing.assert_array_equal(example.targets, [301, 302, 303, EOS, 201, 202, 203, 204, EOS, 101, 102, EOS])
    np.testing.assert_array_equal(example.document, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(example.reset, [True, True, False])
    assert example.valid.all()
    assert example.text.all()
    assert not example.answer.any()
    assert (example.distance == -1).all()


def test_packed_numbers_several_documents_of_a_segment_and_resets_the_row():
    example = source([2] * 7, 5).example(step=0, row=0, rows=1, segments=2)
    np.testing.assert_array_equal(example.document, [0, 0, 1, 1, 2, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(example.reset, [True, False])
    # The next row begins with the fifth document's end, and what comes before is not its own: reset all the same.
    following = source([3, 8], 5).example(step=0, row=1, rows=2, segments=1)
    np.testing.assert_array_equal(following.reset, [True])
    assert following.tokens[0] % 100 != 0


def test_packed_reads_every_token_once_an_epoch_then_in_another_order():
    lengths = [7, 1, 12, 5, 9, 2]  # 36 tokens: with 3 rows of 2 segments of 3, two steps an epoch
    reader = source(lengths, 3)
    epochs = []
    for epoch in range(2):
        rows = [reader.example(2 * epoch + step, row, 3, 2) for step in range(2) for row in range(3)]
        epochs.append(np.concatenate([row.tokens for row in rows]))
    expected = np.sort(np.concatenate([100 * d + np.arange(n) for d, n in enumerate(lengths, start=1)]))
    for tokens in epochs:
        np.testing.assert_array_equal(np.sort(tokens), expected)
    assert not np.array_equal(*epochs)


def test_packed_row_longer_than_the_corpus_goes_round():
    example = source([2, 3], 4).example(step=0, row=0, rows=1, segments=4)
    assert np.bincount(example.tokens)[[100, 101, 200, 201, 202]].sum() == 16
    assert (example.targets == EOS).sum() in (6, 7)


def test_ordered_rows_in_full():
    # Document 1 has 7 tokens, document 2 has 3; segments of four; each row owns one of them and repeats it.
    reader = source([7, 3], 4, packing="ordered")
    rows = [[reader.example(step, row, 2, 1) for step in range(3)] for row in range(2)]
    long, short = sorted(rows, key=lambda row: row[0].tokens[0])
    tokens = [[100, 101, 102, 103], [104, 105, 106, PAD], [100, 101, 102, 103]]
    targets = [[101, 102, 103, 104], [105, 106, EOS, PAD], [101, 102, 103, 104]]
    valid = [[True] * 4, [True] * 3 + [False], [True] * 4]
    for step in range(3):
        np.testing.assert_array_equal(long[step].tokens, tokens[step])
        np.testing.assert_array_equal(long[step].targets, targets[step])
        np.testing.assert_array_equal(long[step].valid, valid[step])
        np.testing.assert_array_equal(long[step].text, valid[step])
        np.testing.assert_array_equal(long[step].reset, [step != 1])
        np.testing.assert_array_equal(long[step].document, [0] * 4)
        np.testing.assert_array_equal(short[step].tokens, [200, 201, 202, PAD])
        np.testing.assert_array_equal(short[step].reset, [True])


def test_ordered_is_the_same_walk_however_many_segments_a_step_takes():
    reader = source([9, 22, 4, 13, 31, 2, 17], 4, packing="ordered")
    one = [[reader.example(step, row, 3, 1) for step in range(24)] for row in range(3)]
    for segments in (2, 3, 4):
        for row in range(3):
            for step in range(24 // segments):
                wide = reader.example(step, row, 3, segments)
                parts = one[row][step * segments : (step + 1) * segments]
                for name in wide._fields:
                    np.testing.assert_array_equal(
                        getattr(wide, name), np.concatenate([getattr(part, name) for part in parts]), err_msg=name
                    )


def test_ordered_rows_share_the_documents_out_and_continue_without_gaps():
    lengths = [9, 22, 4, 13, 31, 2, 17]
    reader = source(lengths, 4, packing="ordered")
    owners: dict[int, set[int]] = {}
    for row in range(3):
        before = -1
        for step in range(60):
            example = reader.example(step, row, 3, 1)
            document, start = divmod(int(example.tokens[0]), 100)
            owners.setdefault(document, set()).add(row)
            assert example.reset[0] == (start == 0)
            if not example.reset[0]:
                assert example.tokens[0] == before + 1  # exactly where the step before stopped
            before = int(example.tokens[example.valid][-1])
    assert sorted(owners) == [1, 2, 3, 4, 5, 6, 7]
    assert all(len(rows) == 1 for rows in owners.values())


def test_ordered_reads_the_same_documents_in_another_order_the_next_time():
    reader = source([4] * 6, 4, packing="ordered")
    first, second = ([int(reader.example(6 * epoch + i, 0, 1, 1).tokens[0]) for i in range(6)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [100, 200, 300, 400, 500, 600]
    assert first != second


def test_ordered_cuts_long_documents():
    reader = source([23], 4, packing="ordered", document_segments=2)
    rows = [[reader.example(step, row, 3, 1) for step in range(2)] for row in range(3)]
    rows.sort(key=lambda row: row[0].tokens[0])
    assert [int(row[0].tokens[0]) for row in rows] == [100, 108, 116]
    for first, second in rows:
        assert (first.reset[0], second.reset[0]) == (True, False)
    # A cut is no end: the last target of a piece is the next token of the document.
    assert rows[0][1].targets[-1] == 108
    np.testing.assert_array_equal(rows[2][1].tokens, [120, 121, 122, PAD])
    np.testing.assert_array_equal(rows[2][1].targets, [121, 122, EOS, PAD])


def test_ordered_needs_a_document_for_each_row_to_train_on():
    reader = source([5] * 8, 4, packing="ordered", held_out_fraction=0.25)
    with pytest.raises(UserError, match=r"6 training documents for data\.rows=7 rows.*document_segments"):
        reader.example(0, 0, 7, 1)
    shared = [reader.example(0, row, 7, 1, held_out=True).tokens[0] for row in range(7)]
    assert len(set(shared)) == 2


@pytest.mark.parametrize("packing", ["packed", "ordered"])
def test_held_out_documents_are_never_trained_on(packing):
    reader = source([6] * 40, 3, packing=packing, held_out_fraction=0.1)
    seen = [
        {int(t) // 100 for s in range(60) for row in range(4) for t in reader.example(s, row, 4, 2, part).tokens if t}
        for part in (False, True)
    ]
    assert len(seen[0]) == 36
    assert len(seen[1]) == 4
    assert not seen[0] & seen[1]
    other_seed = source([6] * 40, 3, seed=5, packing=packing, held_out_fraction=0.1)
    again = {
        int(t) // 100 for s in range(60) for row in range(4) for t in other_seed.example(s, row, 4, 2, True).tokens
    }
    assert again - {0} == seen[1]


def test_equal_documents_stay_on_one_side():
    """Twenty texts, each of them there up to four times: whichever are held out, training never reads them."""
    texts = [np.arange(5) + 10 * (i // 4) for i in range(80)]
    for fraction in (0.01, 0.1, 0.31, 0.5, 0.97):
        reader = DocumentSource(MemoryDocuments(texts, EOS, PAD), 5, DocumentFields(held_out_fraction=fraction), 0, "x")
        trained, held_out = (
            {reader.example(0, row, 80, 1, part).tokens.tobytes() for row in range(80)} for part in (False, True)
        )
        assert (len(trained) + len(held_out), trained & held_out) == (20, set())
        assert abs(len(held_out) - 20 * fraction) <= 1
    with pytest.raises(UserError, match=r"none left to train on \(equal ones stay together"):
        DocumentSource(MemoryDocuments(texts[:4], EOS, PAD), 5, DocumentFields(), 0, "x")


def test_threads_may_be_epochs_apart():
    """What another thread drops from the orders while one asks for its own does no harm."""

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    layout = Ordered(np.array([8, 8]), 8, DocumentFields(packing="ordered"), 0, False)
    expected = layout.spans(5, 0, 2, 1)
    layout._orders = Forgetful()
    assert layout.spans(5, 0, 2, 1) == expected


def test_nothing_held_out_and_too_few_documents_are_messages():
    with pytest.raises(UserError, match="held_out_fraction above 0"):
        source([5, 5], 4).example(0, 0, 1, 1, held_out=True)
    with pytest.raises(UserError, match="none left to train"):
        source([5], 4, held_out_fraction=0.02)
    with pytest.raises(UserError, match="0 documents with text"):
        source([0, 0], 4)
    with pytest.raises(ValueError, match="held_out_fraction must be at least 0 and below 1"):
        DocumentFields(held_out_fraction=1.0)
    with pytest.raises(ValueError, match="document_segments must be at least 1"):
        DocumentFields(document_segments=0)


def test_empty_documents_are_left_out():
    reader = source([0, 4, 0], 4)
    np.testing.assert_array_equal(reader.example(0, 0, 1, 1).tokens, [200, 201, 202, 203])


@pytest.mark.parametrize("layout", [Packed, Ordered])
def test_far_steps_cost_no_walk(layout):
    lengths = 1 + np.arange(1000) % 50
    spans = layout(lengths, 8, DocumentFields(), 0, False).spans(10**9, 3, 16, 4)
    assert sum(span.count for span in spans) <= 32
    assert spans[0].position == 0


def test_hashes_and_orders_are_fixed():
    # A change here gives every run other data: it must be on purpose.
    assert draw(0, "a", 1) == 15931560925959589417
    np.testing.assert_array_equal(shuffled(8, 0, "a"), [7, 5, 6, 0, 2, 1, 3, 4])
    assert content_hash(np.array([1, 2], np.uint16)) == content_hash(np.array([1, 2], np.int64)) == 16575463538019919403
    assert sorted(shuffled(1000, "x", 1)) == list(range(1000))
    assert not np.array_equal(shuffled(1000, "x", 1), shuffled(1000, "x", 2))
