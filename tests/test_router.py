"""Where a router sends a token, with which weights, and what its logits train."""

import pytest
import torch
from torch import nn

from models.router import Router, RowRouter, recorded_router_logits, route


def router(top_k=2, gate_gradient="all"):
    made = Router(4, 3, top_k).double()
    made.gate_gradient = gate_gradient
    made.weight.data = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return made


def test_route_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]).log()
    index, weights = route(logits, 2)
    assert index.tolist() == [[0, 2], [1, 2]]
    assert torch.allclose(weights, torch.tensor([[5 / 8, 3 / 8], [2 / 3, 1 / 3]]))
    assert route(logits, 1)[1].tolist() == [[1], [1]]


def test_a_new_router_is_zero_and_has_no_bias():
    made = Router(4, 3, 2)
    assert list(made.state_dict()) == ["weight"] and not made.weight.any() and made.weight.shape == (3, 4)
    assert (made.top_k, made.gate_gradient, made.bias, made.off) == (2, "all", None, None)


def test_logits_are_a_product_and_the_choice_is_theirs():
    made, x = router(), torch.randn(5, 4, dtype=torch.float64)
    logits, index, weights = made(x)
    assert torch.allclose(logits, x @ made.weight.T)
    assert torch.equal(index, route(logits, 2)[0]) and torch.equal(weights, route(logits, 2)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_float32_at_least(dtype):
    made, x = router().to(dtype), torch.randn(5, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, weights = made(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, x.float() @ made.weight.float().T)


@pytest.mark.parametrize("gate_gradient", ["all", "router"])
def test_what_the_logits_train(gate_gradient):
    """The routers' weights; what is below them by "all" alone. The choice's weights train what is below by either."""
    made, x = router(gate_gradient=gate_gradient), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits, _, weights = made(x)
    of_weight, of_x = torch.autograd.grad(logits.square().sum(), (made.weight, x), allow_unused=True, retain_graph=True)
    assert torch.allclose(of_weight, 2 * (x @ made.weight.T).T @ x)
    assert of_x is None if gate_gradient == "router" else torch.allclose(of_x, 2 * x @ made.weight.T @ made.weight)
    assert torch.autograd.grad(weights.square().sum(), x)[0].abs().sum() > 0


def test_a_bias_is_added_and_what_is_off_is_never_chosen():
    made, x = router(), torch.randn(50, 4, dtype=torch.float64)
    plain = made(x)[0]
    made.bias, made.off = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([False, False, True])
    logits, index, _ = made(x)
    assert torch.allclose(logits[:, :2], plain[:, :2] + torch.tensor([0.5, -1.0]))
    assert set(index.flatten().tolist()) == {0, 1} and torch.isfinite(logits).all()


def test_rows_go_to_their_experts_in_order():
    logits, index, weights = RowRouter(3)(torch.zeros(6, 2))
    assert logits is None and index.tolist() == [[0], [0], [1], [1], [2], [2]]
    assert weights.tolist() == [[1]] * 6


def test_logits_are_recorded_within_and_not_after():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = router(), router()

        def forward(self, x):
            return self.first(x)[0], self.second(2 * x)[0]

    model, x = Model(), torch.randn(5, 4, dtype=torch.float64)
    with recorded_router_logits(model) as logits:
        expected = model(x)
    model(x)
    assert len(logits) == 2 and all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    with pytest.raises(KeyError), recorded_router_logits(model) as logits:
        raise KeyError
    model(x)
    assert not logits
