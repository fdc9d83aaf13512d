import pytest
import torch

from puna.llama import attention, attention_products
from puna.llama.attention import Mask, by_document, sdpa, segment_lengths, tiles
from puna.llama.attention_products import causal_products, document_starts

DOCUMENTS = torch.tensor([[4, 4, 4, 5, 5, 6, 6, 6, 6, 6], [1, 1, 1, 1, 1, 1, 1, 1, 2, 9]])


def heads(num_heads=4, num_kv_heads=2, dtype=torch.float64):
    shapes = ((2, 10, num_heads, 8), (2, 10, num_kv_heads, 8), (2, 10, num_kv_heads, 8))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def by_hand(query, key, value, seen):
    """Softmax attention written out, query head h on key head h // (H / K)."""
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def rule(mask, rows=2, length=10):
    """The rules of a mask, pair by pair."""
    seen = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        for q in range(length):
            for k in range(length):
                in_prefix = mask.prefix is not None and max(q, k) < mask.prefix[row]
                same = mask.documents is None or bool(mask.documents[row, q] == mask.documents[row, k])
                seen[row, 0, q, k] = same and (not mask.causal or k <= q or in_prefix)
    return seen


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(documents=DOCUMENTS),
        Mask(documents=DOCUMENTS, causal=False),
        Mask(prefix=torch.tensor([3, 0])),
        Mask(prefix=torch.tensor([4, 10]), documents=DOCUMENTS),
    ],
    ids=["causal", "all", "documents", "documents-all", "prefix", "prefix-documents"],
)
def test_every_mask_equals_attention_written_out_with_gradients(mask):
    inputs = heads()
    grad = torch.randn_like(inputs[0])
    mixed = mask.attend(10, torch.device("cpu"))(*inputs)
    wanted = by_hand(*inputs, rule(mask))
    torch.testing.assert_close(mixed, wanted)
    gradients = torch.autograd.grad(mixed, inputs, grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, inputs, grad))


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_gradients_do_not_depend_on_the_tile(tile, num_kv_heads, monkeypatch):
    inputs, mask = heads(num_kv_heads=num_kv_heads), Mask(documents=DOCUMENTS)
    grad = torch.randn_like(inputs[0])
    wanted = torch.autograd.grad(by_hand(*inputs, rule(mask)), inputs, grad)
    monkeypatch.setattr(attention, "TILE", tile)
    mixed = mask.attend(10, torch.device("cpu"))(*inputs)
    torch.testing.assert_close(torch.autograd.grad(mixed, inputs, grad), wanted)


@pytest.mark.parametrize("length", [1, 7, 128, 129, 1000])
def test_tiles_cover_the_triangle_once(length):
    covered = torch.zeros(length, length, dtype=torch.long)
    for rows, columns in tiles(0, length):
        square = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.long)
        covered[rows, columns] += square.tril() if rows == columns else square
    assert torch.equal(covered, torch.ones_like(covered).tril())


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
@pytest.mark.parametrize("score_bytes", [1, 1 << 22], ids=["a row", "all rows"])
def test_products_equal_attention_written_out(tile, num_kv_heads, documents, score_bytes, monkeypatch):
    monkeypatch.setattr(attention_products, "TILE", tile)
    monkeypatch.setattr(attention_products, "SCORE_BYTES", score_bytes)
    inputs, mask = heads(num_kv_heads=num_kv_heads), Mask(documents=documents)
    grad = torch.randn_like(inputs[0])
    mixed = causal_products(*inputs, None if documents is None else document_starts(documents))
    wanted = by_hand(*inputs, rule(mask))
    torch.testing.assert_close(mixed, wanted)
    gradients = torch.autograd.grad(mixed, inputs, grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, inputs, grad))


def test_products_are_an_operator_that_can_be_traced():
    for starts in (None, document_starts(DOCUMENTS)):
        checks = torch.library.opcheck(causal_products, (*heads(), starts))
        assert set(checks.values()) == {"SUCCESS"}


def test_rows_of_one_document_are_whole_rows(monkeypatch):
    inputs, seen = heads(), []
    monkeypatch.setattr(attention, "causal_products", lambda *args: seen.append(args[3]))
    for documents in (torch.tensor([[3] * 10, [4] * 10]), None):
        Mask(documents=documents).attend(10, torch.device("cpu"))(*inputs)
    assert seen == [None, None]
    monkeypatch.setattr(attention, "SHORT", 9)
    assert Mask().attend(10, torch.device("cpu"))(*inputs).shape == (2, 10, 4, 8)
    assert len(seen) == 2


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
def test_bfloat16_goes_by_products_and_is_near_float32(documents, monkeypatch):
    monkeypatch.setattr(attention, "flash", None)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in heads(dtype=torch.float32)]
    inputs = [half.detach().float().requires_grad_() for half in halves]
    grad = torch.randn_like(halves[0])
    mixed = Mask(documents=documents).attend(10, torch.device("cpu"))(*halves)
    wanted = by_hand(*inputs, rule(Mask(documents=documents)))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), wanted, atol=0.03, rtol=0.03)
    exact = torch.autograd.grad(wanted, inputs, grad.float())
    for half, full in zip(torch.autograd.grad(mixed, halves, grad), exact, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


def test_by_document_equals_the_explicit_mask():
    inputs = heads()
    explicit = sdpa(*inputs, seen=Mask(documents=DOCUMENTS).visible(torch.arange(10)[None], 10))
    torch.testing.assert_close(by_document(segment_lengths(DOCUMENTS))(*inputs), explicit)


def test_a_document_starts_where_its_id_does():
    assert document_starts(DOCUMENTS).tolist() == [[0, 0, 0, 3, 3, 5, 5, 5, 5, 5], [0] * 8 + [8, 9]]
    assert document_starts(torch.tensor([[7, 8, 7]])).tolist() == [[0, 1, 2]]


def test_segments_end_at_rows_even_if_ids_go_on():
    assert segment_lengths(torch.tensor([[0, 0, 1], [1, 1, 1]])) == [2, 1, 3]
    assert segment_lengths(DOCUMENTS) == [3, 2, 5, 8, 1, 1]


def test_queries_at_their_own_positions_see_keys_up_to_them():
    seen = Mask().visible(torch.tensor([[2], [0]]), 4)
    assert seen.flatten(1).tolist() == [[True, True, True, False], [True, False, False, False]]
