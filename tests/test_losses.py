"""The auxiliary losses by hand-worked numbers and float64 gradient checks."""

import math

import torch

from models.losses import gate_loss, low_rank_change, mean_routing_probs, routing_hits


def test_mean_routing_probs_by_hand():
    # one sample of 3 tokens, the last is padding; 2 layers; 2 experts; logits log(p) give probabilities p
    layer_1 = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0001, 0.9999]]).log()
    layer_2 = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.0001, 0.9999]]).log()
    actual = mean_routing_probs((layer_1, layer_2), torch.tensor([[1, 1, 0]]))
    # token 1: (0.9 + 0.7) / 2 = 0.8, token 2: (0.5 + 0.1) / 2 = 0.3, mean 0.55
    assert torch.allclose(actual, torch.tensor([[0.55, 0.45]]), atol=1e-6)


def test_gate_loss_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    expected = -(math.log(0.5) + math.log(0.8)) / 2
    assert abs(gate_loss(probs, torch.tensor([0, 2])).item() - expected) < 1e-7
    assert gate_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item() == 0  # the minimum


def test_gate_loss_with_weights_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    expected = -(3.0 * math.log(0.5) + 0.25 * math.log(0.8)) / 2  # over samples, not over the weights' sum
    actual = gate_loss(probs, torch.tensor([0, 2]), torch.tensor([3.0, 0.25]))
    assert abs(actual.item() - expected) < 1e-7


def test_routing_hits_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    assert routing_hits(probs, torch.tensor([0, 1, 2, 0])).tolist() == [True, False, True, False]


def test_gate_loss_gradcheck_ignores_masked_tokens():
    torch.manual_seed(0)
    logits = tuple(torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def loss(*router_logits):
        return gate_loss(mean_routing_probs(router_logits, mask), torch.tensor([1, 2]))

    assert torch.autograd.gradcheck(loss, logits)
    loss(*logits).backward()
    for layer in logits:
        assert layer.grad.view(2, 3, 3)[mask == 0].abs().max() == 0
        assert layer.grad.view(2, 3, 3)[mask == 1].abs().min() > 0


def test_drift_by_hand():
    # A = [3 4], B = [1; 2]: BA = [[3, 4], [6, 8]]; start A0 = [1 0], B0 = [1; 0]: B0 A0 = [[1, 0], [0, 0]]
    a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0], [2.0]]])
    a0, b0 = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0], [0.0]]])
    # change [[2, 4], [6, 8]]: 4 + 16 + 36 + 64 = 120; times scaling 0.5
    assert torch.allclose(low_rank_change(a, b, a0, b0, torch.tensor([0.5])), torch.tensor([0.5 * math.sqrt(120)]))
    assert low_rank_change(a, b, a0, b0, torch.tensor([-0.5])) > 0  # a norm, whatever the scaling's sign
    shorter = [tensor / 10 for tensor in (a, b, a0, b0)]  # below 1 too: change / 100
    assert torch.allclose(low_rank_change(*shorter, torch.ones(1)), torch.tensor([math.sqrt(120) / 100]))


def test_drift_equals_the_materialised_change_and_its_gradient():
    torch.manual_seed(0)
    a0, b0 = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    a, b = (t + 0.1 * torch.randn_like(t) for t in (a0, b0))
    scaling = torch.tensor([2.0, 0.5], dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    dense = (scaling[:, None, None] * (b @ a - b0 @ a0)).flatten(1).norm(dim=1)
    ours = low_rank_change(a, b, a0, b0, scaling)
    assert torch.allclose(ours, dense, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: low_rank_change(a, b, a0, b0, scaling), (a, b))


def test_drift_is_exactly_zero_at_the_start_with_zero_gradient():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 64, requires_grad=True), torch.randn(2, 32, 4, requires_grad=True)
    change = low_rank_change(a, b, a.detach().clone(), b.detach().clone(), torch.ones(2))
    assert change.tolist() == [0, 0]
    change.sum().backward()
    assert not a.grad.any() and not b.grad.any()


def test_drift_keeps_its_digits_near_the_start():
    torch.manual_seed(0)
    a0, b0 = torch.randn(1, 8, 512), torch.randn(1, 256, 8)
    a, b = a0.clone(), b0 + 1e-6 * torch.randn_like(b0)
    exact = (b.double() @ a.double() - b0.double() @ a0.double()).norm()
    assert abs(low_rank_change(a, b, a0, b0, torch.ones(1)).item() / exact - 1) < 1e-2
