"""The shared-base FFN against a mixture of densely merged FFNs, in values, gradients, dtypes and memory."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from models.expert_ffn import ACTIVATIONS, PROJECTIONS, LowRankExperts, SharedBaseFFN
from models.mixture import MixtureConfig, mixture_class
from models.router import route

HIDDEN, WIDTH, RANK = 6, 10, 2

DENSE_ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


def make(num_experts=3, top_k=2, dtype=torch.float64, bias=False, seed=0, hidden=HIDDEN, width=WIDTH, tokens=5):
    """(base linears, experts, x (N, D), top_k_index (N, K), top_k_weights (N, K)), the choices of a random router."""
    torch.manual_seed(seed)
    sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    base = [nn.Linear(*sizes[p], bias=bias, dtype=dtype).requires_grad_(False) for p in PROJECTIONS]
    experts = LowRankExperts(hidden, width, num_experts, RANK).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    experts.scaling.copy_(torch.rand(3, num_experts) + 0.5)
    x = torch.randn(tokens, hidden, dtype=dtype)
    return base, experts, x, *route(torch.randn(tokens, num_experts, dtype=dtype), min(top_k, num_experts))


def dense_mixture(base, experts, x, index, weights):
    """sum_i w_i FFN_i(x), each FFN_i with its merged weights: nothing shared, every expert on every token."""
    num_experts = len(experts.gate_proj_A)
    weights = torch.zeros(len(x), num_experts, dtype=weights.dtype).scatter(1, index, weights)
    y = 0
    for i in range(num_experts):
        merged = []
        for p, (name, linear) in enumerate(zip(PROJECTIONS, base, strict=True)):
            a, b = experts.matrices(name)
            merged.append((linear.weight + experts.scaling[p, i] * b[i] @ a[i], linear.bias))
        hidden = DENSE_ACTIVATIONS[experts.activation](F.linear(x, *merged[0])) * F.linear(x, *merged[1])
        y = y + weights[:, i, None] * F.linear(hidden, *merged[2])
    return y


@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_dense_mixture_with_all_gradients(num_experts, top_k, bias, activation):
    base, experts, x, *_ = make(num_experts, bias=bias)
    experts.activation = activation
    logits = torch.randn(5, num_experts, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    inputs = [x, *([logits] if top_k > 1 else []), *experts.parameters()]
    choice = route(logits, top_k)  # weights of a row sum to 1: then one down_proj bias serves all experts
    ours, dense = experts(x, *choice, *base), dense_mixture(base, experts, x, *choice)
    assert (ours - dense).abs().max() < 1e-12
    grad_y = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad_y, retain_graph=True),
        torch.autograd.grad(dense, inputs, grad_y),
        strict=True,
    ):
        assert (mine - reference).abs().max() <= 1e-13 * max(1, reference.abs().max())


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dropout, activation", [(0.0, "silu"), (0.4, "silu"), (0.4, "gelu_pytorch_tanh")])
def test_gradcheck_of_every_input(top_k, dropout, activation):
    base, experts, x, index, weights = make(3, top_k, tokens=2)
    own = F.dropout(experts.own_columns(index).double(), dropout)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weights, *experts.side_by_side(x.dtype))]
    frozen = tuple(t for linear in base for t in (linear.weight, None))

    def function(x, weights, *matrices):  # weights of a row sum to 1, as the kernel needs them
        return SharedBaseFFN.apply(x, weights / weights.sum(-1, keepdim=True), own, frozen, *matrices, activation)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8)


def test_dropout_takes_low_rank_states_of_single_tokens_and_keeps_their_mean():
    base, experts, x, index, weights = make(tokens=3)
    exact = experts(x, index, weights, *base)
    experts.dropout = 0.3
    assert torch.equal(experts.eval()(x, index, weights, *base), exact)
    experts.train()
    torch.manual_seed(0)
    draws = torch.stack([experts(x, index, weights, *base) for _ in range(2)])
    assert (draws[0] - draws[1]).abs().amax(1).min() > 1e-4  # every token
    own = experts.own_columns(index).double()
    dropped = torch.stack([F.dropout(own, 0.3) for _ in range(4000)])
    assert not dropped[:, own == 0].any() and (dropped[:, own == 1].mean(0) - 1).abs().max() < 0.06


@pytest.mark.parametrize("frozen", ["x", "weights", "experts"])
def test_each_part_may_be_frozen(frozen):
    base, experts, x, index, weights = make()
    x.requires_grad_(frozen != "x"), weights.requires_grad_(frozen != "weights")
    experts.requires_grad_(frozen != "experts")
    inputs = [t for t in (x, weights, *experts.parameters()) if t.requires_grad]
    ours = torch.autograd.grad(experts(x, index, weights, *base).square().sum(), inputs)
    dense = torch.autograd.grad(dense_mixture(base, experts, x, index, weights).square().sum(), inputs)
    assert all((a - b).abs().max() < 1e-13 * b.abs().max() for a, b in zip(ours, dense, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2**-24), (torch.float16, 2**-11), (torch.bfloat16, 2**-9)])
def test_lower_precision_is_as_close_as_dense_experts_in_it(dtype, rounding, top_k):
    """Outputs and all gradients: a few roundings from the exact ones, and hardly further than the dense mixture's,
    whose experts are merged in fp32 and rounded once (W + s B A). Deltas are smaller than the base, as LoRA's are."""
    base, experts, x, index, weights = make(top_k=top_k, hidden=64, width=160, tokens=50)
    with torch.no_grad():
        for matrix in experts.parameters():
            matrix *= 0.3
    grad_y = torch.randn_like(x)
    inputs = [x.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    exact_y = dense_mixture(base, experts, x, index, weights)
    exact = [exact_y, *torch.autograd.grad(exact_y, inputs, grad_y)]
    merged = dense_in(dtype, base, experts, index, weights)
    for linear in base:
        linear.to(dtype)
    experts.float()
    low_x, low_weights = (t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (weights, torch.float32)))

    def errors(y, inputs):
        assert y.dtype == dtype
        low = [y, *torch.autograd.grad(y, inputs, grad_y.to(dtype))]
        pairs = zip((t.detach().double() for t in low), (t.detach() for t in exact), strict=False)
        return [float((value - true).norm() / true.norm()) / rounding for value, true in pairs]

    ours = errors(experts(low_x, index, low_weights, *base), [low_x, low_weights, *experts.parameters()])
    dense = errors(merged(low_x), [low_x])
    assert max(ours) < 12  # fp32's and fp16's products on a CPU add up in that dtype, bf16's in fp32
    assert all(mine < 2 * reference for mine, reference in zip(ours, dense, strict=False)), (ours, dense)


def dense_in(dtype, base, experts, index, weights):
    """x -> the mixture of merged experts, all of it in dtype but the exact routing weights."""
    weights = torch.zeros(len(index), 3, dtype=torch.float64).scatter(1, index, weights.detach()).float()
    weight = dict(zip(PROJECTIONS, (linear.weight for linear in base), strict=True))
    merged = [[experts.merged(i, p, weight[p]).detach().to(dtype) for p in PROJECTIONS] for i in range(3)]

    def forward(x):
        parts = [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for gate, up, down in merged]
        return sum(weights[:, i, None] * part for i, part in enumerate(parts)).to(dtype)

    return forward


def test_autocast_runs_in_its_dtype_and_reaches_fp32_experts():
    base, experts, x, *choice = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, *choice, *base)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in experts.parameters())


def saved_for_backward(compute, parameters) -> int:
    """Number of values that autograd keeps for the backward, `parameters` aside."""
    addresses = {tensor.data_ptr() for tensor in parameters}
    saved = {}

    def keep(tensor):
        if tensor.data_ptr() not in addresses:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(saved.values())


@pytest.mark.parametrize("top_k", [2, 3])
def test_saves_two_widths_per_token_whatever_top_k(top_k):
    """The backward keeps W_g x and W_u x: 2 F per token (small parts aside), where plain autograd keeps over 10 F."""
    width, tokens = 512, 64
    experts, linears = LowRankExperts(16, width, 3, 2), []
    for size in ((16, width), (16, width), (width, 16)):
        linears.append(nn.Linear(*size, bias=False).requires_grad_(False))
    parameters = [*experts.parameters(), *experts.buffers(), *(layer.weight for layer in linears)]
    x = torch.randn(tokens, 16, requires_grad=True)
    choice = route(torch.randn(tokens, 3), top_k)
    assert saved_for_backward(lambda: experts(x, *choice, *linears), parameters) / (tokens * width) < 2.2
    plain = saved_for_backward(lambda: dense_mixture(linears, experts, x, *choice), parameters)
    assert plain / (tokens * width) > 10  # what is counted does see what plain autograd keeps


def test_inference_saves_nothing():
    base, experts, x, *choice = make()
    with torch.no_grad():
        assert saved_for_backward(lambda: experts(x, *choice, *base), []) == 0
    experts.requires_grad_(False)
    assert saved_for_backward(lambda: experts(x, *choice, *base), []) == 0


def test_gradient_checkpointing_gives_the_same_gradients():
    base, experts, x, *choice = make()
    x.requires_grad_()
    inputs = [x, *experts.parameters()]
    direct = torch.autograd.grad(experts(x, *choice, *base).square().sum(), inputs)
    again = checkpoint(experts, x, *choice, *base, use_reentrant=False)
    recomputed = torch.autograd.grad(again.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_decoder_layer_compiles_in_one_graph(backend, activation):
    """fullgraph=True: no host synchronisation and no shape that depends on the routing."""
    torch.manual_seed(0)
    config = tiny_config(hidden_act=activation)
    fused = mixture_class(LlamaForCausalLM)(config)
    fused.become(MixtureConfig([{}] * 3, 2, 2, "", {}))
    model = fused.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer = model.layers[0]
    for parameter in (*layer.mlp.experts.parameters(), layer.mlp.router.weight):
        nn.init.normal_(parameter.requires_grad_(), std=0.3)
    x = torch.randn(2, 7, config.hidden_size)
    settings = dict(position_embeddings=model.rotary_emb(x, torch.arange(7)[None]), attention_mask=None)
    trained = [*layer.mlp.experts.parameters(), layer.mlp.router.weight]
    torch._dynamo.reset()
    results = []
    for forward in (layer, torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)):
        y = forward(x, **settings)
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() < 1e-4 * eager.norm()


def test_padding_of_a_smaller_rank_stays_zero_under_training():
    base, experts, x, *choice = make()
    with torch.no_grad():
        for name in PROJECTIONS:
            a, b = experts.matrices(name)
            a[0, 1:], b[0, :, 1:] = 0, 0  # expert 0 has rank 1
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        experts(x, *choice, *base).square().sum().backward()
        optimizer.step()
    for name in PROJECTIONS:
        a, b = experts.matrices(name)
        assert not a[0, 1:].any() and not b[0, :, 1:].any()
        assert a[1, 1:].any()


def test_a_trainable_base_is_refused():
    base, experts, x, *choice = make()
    base[1].requires_grad_(True)
    with pytest.raises(ValueError, match="must be frozen"):
        experts(x, *choice, *base)


def test_with_gradients_a_base_that_is_more_than_its_dense_weights_is_refused():
    """It would be multiplied without LoRA's part, or without an 8-bit weight's scales."""
    base, experts, x, *choice = make()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapted = get_peft_model(nn.Sequential(base[0]), config).base_model.model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="would ignore what Linear adds to them"):
        experts(x, *choice, adapted, *base[1:])
    with torch.no_grad():  # which calls the layers
        assert not torch.equal(experts(x, *choice, adapted, *base[1:]), experts(x, *choice, *base))
    base[2].weight = nn.Parameter((base[2].weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="are torch.int8: with gradients only dense ones and NF4"):
        experts(x, *choice, *base)
    base[2].weight = nn.Parameter(torch.zeros(base[2].weight.shape).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="are torch.float8_e4m3fn"):
        experts(x, *choice, *base)
    base[2].weight = nn.Parameter(base[2].weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="are offloaded"):
        experts(x, *choice, *base)


def test_the_scalings_are_fp32_on_a_device_without_float64():
    """MPS: a module's way to a device that refuses float64, stood in for by a function that does."""
    _, experts, *_ = make()
    expected = experts.scaling.clone()

    def to_device(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    moved = experts.float()
    moved.scaling = expected  # as `masters` leaves it
    moved._apply(to_device)
    assert moved.scaling.dtype == torch.float32 and torch.allclose(moved.scaling.double(), expected)
    assert experts.to(torch.float64).scaling.dtype == torch.float64 and "scaling" in experts.state_dict()


def test_a_gradient_of_the_gradient_is_refused():
    """The backward is written by hand, and not differentiable itself."""
    base, experts, x, *choice = make()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(experts(x, *choice, *base).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_new_experts_change_nothing_and_have_their_shapes():
    experts = LowRankExperts(HIDDEN, WIDTH, 3, RANK)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    wide, narrow = (3, RANK, WIDTH), (3, RANK, HIDDEN)
    assert shapes == {
        "gate_proj_A": narrow, "gate_proj_B": wide, "up_proj_A": narrow, "up_proj_B": wide,
        "down_proj_A": wide, "down_proj_B": narrow,
    }  # fmt: skip
    assert not any(p.any() for p in experts.parameters())
    assert experts.scaling.dtype == torch.float64 and experts.scaling.tolist() == [[1.0] * 3] * 3
    assert (experts.activation, experts.dropout) == ("silu", 0.0)


def test_folded_scalings_leave_the_function_and_every_merge():
    base, experts, x, *choice = make()
    expected = experts(x, *choice, *base)
    merged = {
        (i, p): experts.merged(i, p, linear.weight)
        for i in range(3)
        for p, linear in zip(PROJECTIONS, base, strict=True)
    }
    before = {name: p.clone() for name, p in experts.named_parameters()}
    experts.fold_scaling(torch.float64)
    changed = {name for name, p in experts.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"gate_proj_A", "up_proj_A", "down_proj_B"}  # those that meet x and y, as in training
    assert (experts(x, *choice, *base) - expected).abs().max() < 1e-6 * expected.abs().max()  # scalings rounded to fp32
    assert experts.scaling.tolist() == [[1.0] * 3] * 3 and experts.scaling.dtype == torch.float64
    for (i, p), before in merged.items():
        assert torch.allclose(experts.merged(i, p, base[PROJECTIONS.index(p)].weight), before, rtol=1e-5, atol=1e-6)
    experts.fold_scaling(torch.bfloat16)
    assert {p.dtype for p in experts.parameters()} == {torch.bfloat16} and experts.scaling.dtype == torch.float64


def test_scalings_that_are_multiplied_in_may_be_gone():
    """As in the shared checkpoint's modeling file, which has none."""
    base, experts, x, *choice = make()
    experts.fold_scaling(torch.float64)
    expected = experts(x, *choice, *base)
    experts.scaling = None
    assert (experts(x, *choice, *base) - expected).abs().max() < 1e-12


def test_a_merge_is_the_base_and_the_scaled_product():
    base, experts, *_ = make()
    for number, (projection, linear) in enumerate(zip(PROJECTIONS, base, strict=True)):
        for expert in range(3):
            a, b = experts.get_parameter(f"{projection}_A")[expert], experts.get_parameter(f"{projection}_B")[expert]
            expected = linear.weight + experts.scaling[number, expert] * b.T @ a
            assert torch.allclose(experts.merged(expert, projection, linear.weight), expected)


def test_masters_are_fp32_with_their_scalings_whole():
    _, experts, *_ = make()
    scaling = experts.scaling.clone()
    assert experts.bfloat16().masters() is experts
    assert {p.dtype for p in experts.parameters()} == {torch.float32}
    assert experts.scaling.dtype == torch.float64 and torch.allclose(experts.scaling, scaling, rtol=1e-2)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_without_a_gradient_it_is_the_same_function(top_k):
    base, experts, x, *choice = make(top_k=top_k, bias=True)
    expected = experts(x, *choice, *base)
    with torch.no_grad():
        assert (experts(x, *choice, *base) - expected).abs().max() < 1e-12
        with torch.autocast("cpu", torch.bfloat16):
            assert experts.float()(x.float(), *choice, *(linear.float() for linear in base)).dtype == torch.bfloat16


def test_dropout_is_of_training_alone_and_needs_no_gradient():
    base, experts, x, *choice = make()
    expected = experts(x, *choice, *base)
    experts.dropout = 0.5
    with torch.no_grad():
        assert (experts.train()(x, *choice, *base) - expected).abs().max() > 1e-3
        assert (experts.eval()(x, *choice, *base) - expected).abs().max() < 1e-12
