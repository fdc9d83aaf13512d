import pytest
import torch
from torch.nn.functional import cross_entropy

from puna.llama import loss
from puna.llama.loss import token_loss_sum


@pytest.fixture(params=[1, 5, 1 << 20], ids=["a token a chunk", "ragged chunks", "one chunk"])
def chunk_tokens(request, monkeypatch):
    """Tokens a chunk at 11 float64 logits a token."""
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setattr(loss, "CHUNK_BYTES", request.param * 11 * 8)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 11, (3, 4))
    targets[0, 1] = targets[2, 3] = -100
    return hidden, weight, targets


def naive(hidden, weight, targets):
    return cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten(), reduction="sum")


@pytest.mark.usefixtures("chunk_tokens")
def test_value_and_gradients_equal_the_whole_matrix():
    hidden, weight, targets = inputs()
    chunked, whole = token_loss_sum(hidden, weight, targets), naive(hidden, weight, targets)
    torch.testing.assert_close(chunked, whole)
    gradients = torch.autograd.grad(3 * chunked, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * whole, (hidden, weight)))
    assert (gradients[0][targets == -100] == 0).all()


@pytest.mark.usefixtures("chunk_tokens")
def test_gradcheck():
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(lambda h, w: token_loss_sum(h, w, targets), (hidden, weight))


def test_chunks_follow_the_bytes_of_their_logits_down_to_the_least_number_of_tokens(monkeypatch):
    rows = []
    mm = torch.mm

    def counted(left, right, **out):
        if right.shape == (4, 50):
            rows.append(len(left))
        return mm(left, right, **out)

    monkeypatch.setattr(torch, "mm", counted)
    monkeypatch.setattr(loss, "MIN_CHUNK", 3)
    for chunk_bytes in (7 * 50 * 4, 1):
        monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
        token_loss_sum(torch.ones(10, 4), torch.ones(50, 4), torch.zeros(10, dtype=torch.long))
    assert rows == [7, 3, 3, 3, 3, 1]


def test_only_the_gradients_asked_for(monkeypatch):
    hidden, weight, targets = inputs()
    token_loss_sum(hidden.detach(), weight, targets).backward()
    token_loss_sum(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    monkeypatch.setattr(loss, "add_product", None)
    with torch.no_grad():
        assert not token_loss_sum(hidden, weight, targets).requires_grad


def test_no_counted_token_gives_zero_and_zero_gradients():
    hidden, weight, targets = inputs()
    total = token_loss_sum(hidden, weight, torch.full_like(targets, -100))
    total.backward()
    assert total.item() == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_weight_gradient_of_bfloat16_is_summed_in_float32(monkeypatch):
    """2,048 equal contributions: a bfloat16 sum stops growing at 256 of them."""
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2 * 4)
    hidden = torch.ones(2048, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    total = token_loss_sum(hidden, weight, torch.zeros(2048, dtype=torch.long))
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(2048 * 0.6931472, rel=1e-5)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-1024.0, -1024.0], [1024.0, 1024.0]]))


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    total = token_loss_sum(hidden, weight, torch.tensor([1]))
    total.backward()
    assert total.item() == pytest.approx(400.0)
    assert hidden.grad.item() == pytest.approx(2.0)


def test_target_outside_the_vocabulary_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_loss_sum(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([3]))


def test_bfloat16_goes_by_pieces_in_float32(monkeypatch):
    hidden, weight, targets = (t.detach().bfloat16() if t.is_floating_point() else t for t in inputs())
    found = []
    for piece_bytes in (1, 5 * 11 * 4, 1 << 20):
        monkeypatch.setattr(loss, "PIECE_BYTES", piece_bytes)
        halves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = token_loss_sum(*halves, targets)
        found.append([total, *torch.autograd.grad(total, halves)])
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = naive(*exact, targets)
    for total, *gradients in found:
        assert total.dtype == torch.float32
        torch.testing.assert_close(total.double(), wanted, rtol=3e-3, atol=0)
        for half, full, first in zip(
            gradients, torch.autograd.grad(wanted, exact, retain_graph=True), found[0][1:], strict=True
        ):
            assert torch.equal(half, first)
            torch.testing.assert_close(half.double(), full, atol=0.02, rtol=0.02)
