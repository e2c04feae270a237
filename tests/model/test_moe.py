"""The mixture of experts: backends equal the loop, routing and losses equal transformers' and the papers' formulas."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

import train
from nanovlm.command_line import parse_train
from nanovlm.config import DecoderConfig, MoEConfig, VLMConfig
from nanovlm.data.types import IGNORE
from nanovlm.model.build import empty_model
from nanovlm.model.moe import EXPERTS, MoE, Routing, expert_load, fits_capacity
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import NextToken
from nanovlm.objectives.losses import load_balancing_loss, router_loss, router_z_loss
from nanovlm.presets import PRESETS
from nanovlm.train import init
from nanovlm.train.counting import RoutingStats
from nanovlm.train.optim import Muon, make_optimizers
from tests.conftest import HAS_GPU, HAS_TRITON, TINY, make_batch, make_document

# These tests run on the CPU, where the kernels are interpreted if there is no GPU; tests/kernels has those for one.
interpreted = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="needs triton, and no GPU")
BACKENDS = [pytest.param(name, marks=interpreted) if name == "triton" else name for name in EXPERTS]
CONFIG = MoEConfig(num_experts=5, num_experts_per_tok=2, intermediate_size=24)


def random_moe(seed=0, hidden_size=16, **changes):
    torch.manual_seed(seed)
    moe = MoE(dataclasses.replace(CONFIG, **changes), hidden_size)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5)
    return moe


# --- backends ------------------------------------------------------------------------------------------------


def with_gradients(backend, inputs, dtype):
    """Output of a backend, and the gradients of a fixed sum of it for copies of x, weights and the three matrices."""
    x, choice, *rest = inputs
    x, *rest = (t.to(dtype, copy=True).requires_grad_() for t in (x, *rest))
    y = EXPERTS[backend](x, choice, *rest)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *rest))]


def assert_equals_the_loop(backend, choice, num_experts, seed=0, D=16, W=24, dtype=torch.float32):
    """Against the loop in fp64, no further off than twice the loop in `dtype` and a rounding floor."""
    generator = torch.Generator().manual_seed(seed)
    R, k = choice.shape
    shapes = [(R, k), (num_experts, W, D), (num_experts, W, D), (num_experts, D, W)]
    x, *rest = (torch.randn(shape, generator=generator) for shape in [(R, D), *shapes])
    inputs = (x, choice, *rest)
    exact = with_gradients("loop", inputs, torch.float64)
    for name, ours, loop, truth in zip(
        ("output", "x", "weights", "gate", "up", "down"),
        with_gradients(backend, inputs, dtype),
        with_gradients("loop", inputs, dtype),
        exact,
        strict=True,
    ):
        if truth.numel():
            floor = 4 * torch.finfo(dtype).eps * max(truth.abs().max().item(), 1)
            for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
                assert measure(ours - truth) <= 2 * measure(loop - truth) + floor, name


CASES = {
    "some": ([[0, 1], [3, 0], [1, 3]], 4),
    "an expert without tokens": ([[0, 1], [1, 3], [3, 0]], 4),
    "all on one": ([[2]] * 9, 4),
    "k = E": ([[0, 1, 2], [2, 1, 0]], 3),
    "k = 1": ([[0], [2], [1], [0]], 3),
    "one token": ([[1, 0]], 2),
    "one expert": ([[0], [0]], 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_equal_the_loop(backend, case, dtype):
    choice, num_experts = CASES[case]
    assert_equals_the_loop(backend, torch.tensor(choice), num_experts, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens(backend):
    assert_equals_the_loop(backend, torch.empty(0, 2, dtype=torch.int64), 3)


@pytest.mark.parametrize("backend", sorted(EXPERTS.keys() - {"loop", "triton"}))  # tests/kernels draws for triton
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_backends_equal_the_loop_for_any_routing(backend, data):
    num_experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, num_experts))
    rows = data.draw(st.lists(st.permutations(range(num_experts)), max_size=20))
    choice = torch.tensor([row[:k] for row in rows], dtype=torch.int64).view(-1, k)
    assert_equals_the_loop(
        backend, choice, num_experts, seed=data.draw(st.integers(0, 9)), D=8 * data.draw(st.integers(1, 3))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend):
    """The output has the dtype of x and is as near to fp32 as the loop's is; the router decides in fp32."""
    moe, loop = random_moe(experts=backend), random_moe(experts="loop")
    x = torch.randn(2, 7, 16)
    exact, expected = loop(x)
    with torch.autocast("cpu", torch.bfloat16):
        (y, routing), near = moe(x), loop(x)[0]
    assert y.dtype == torch.float32 and torch.equal(routing.logits, expected.logits)
    assert 0 < (near - exact).abs().max() < 0.03 * exact.abs().max()
    assert (y - exact).abs().max() <= 2 * (near - exact).abs().max()


def test_grouped_reads_nothing_back_from_the_device():
    """Tensors without values stand for those on a device: what needs a value on the host raises."""
    with FakeTensorMode():
        moe = MoE(dataclasses.replace(CONFIG, capacity_factor=1.0, balance="bias"), hidden_size=16)
        is_token = torch.ones(1, 9, dtype=torch.bool)
        routing = moe.route(torch.randn(9, 16), is_token.flatten())
        shapes = [(9, 16), (5, 24, 16), (5, 24, 16), (5, 16, 24)]
        x, *matrices = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        y = EXPERTS["grouped"](x, routing.choice, routing.weights.bfloat16(), *matrices)
        (y.sum() + router_loss(Extras((routing,)), is_token, CONFIG)).backward()
        stats = RoutingStats()
        stats.update([routing], is_token, is_token)
        moe.update_bias(stats.load[0])
        with pytest.raises(DynamicOutputShapeException):
            EXPERTS["loop"](x, routing.choice, routing.weights.bfloat16(), *matrices)
        with pytest.raises(DataDependentOutputException):
            stats.summary()


# --- routing -------------------------------------------------------------------------------------------------


def assert_equal_to_rounding(ours, theirs):
    """Products of 16 and of 24 terms follow each other, and either side may add those in an order of its own."""
    assert (ours - theirs).abs().max() <= (16 + 24) * torch.finfo(torch.float32).eps * theirs.abs().max()


@pytest.mark.parametrize(
    ("block", "config", "changes"),
    [
        (modeling_mixtral.MixtralSparseMoeBlock, MixtralConfig, {}),
        (modeling_qwen3_moe.Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, {}),
        (modeling_qwen3_moe.Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, {"norm_topk_prob": False}),
        (modeling_olmoe.OlmoeSparseMoeBlock, OlmoeConfig, {"norm_topk_prob": False}),
    ],
)
@torch.no_grad()
def test_the_layer_equals_transformers(block, config, changes):
    moe = random_moe(**changes)
    norm = {} if config is MixtralConfig else {"norm_topk_prob": moe.config.norm_topk_prob}
    sizes = dict(hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_local_experts=5, num_experts=5)
    theirs = block(config(**sizes, num_experts_per_tok=2, **norm)).eval()
    theirs.gate.weight.copy_(moe.router.weight)
    theirs.experts.gate_up_proj.copy_(torch.cat((moe.gate_proj, moe.up_proj), dim=1))
    theirs.experts.down_proj.copy_(moe.down_proj)
    x = torch.randn(2, 9, 16)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_equal_to_rounding(moe.eval()(x)[0], expected)


@torch.no_grad()
def test_sigmoid_scores_bias_and_shared_experts_equal_transformers():
    """Selection by score plus bias, weights by score alone, normalised and scaled (arXiv 2412.19437, eq. 12 to 16)."""
    moe = random_moe(scores="sigmoid", balance="bias", routed_scaling_factor=2.5, num_shared_experts=2)
    moe.selection_bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, -3.0]))
    sizes = dict(hidden_size=16, moe_intermediate_size=24, n_routed_experts=5, num_experts_per_tok=2)
    config = DeepseekV3Config(**sizes, n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=2.5)
    theirs = modeling_deepseek_v3.DeepseekV3MoE(config).eval()
    theirs.gate.weight.copy_(moe.router.weight)
    theirs.gate.e_score_correction_bias.copy_(moe.selection_bias)
    theirs.experts.gate_up_proj.copy_(torch.cat((moe.gate_proj, moe.up_proj), dim=1))
    theirs.experts.down_proj.copy_(moe.down_proj)
    theirs.shared_experts.load_state_dict(moe.shared.state_dict())
    x = torch.randn(2, 9, 16)
    y, routing = moe(x)
    expected = theirs(x)
    assert (routing.choice == 1).sum(1).eq(1).all() and not (routing.choice == 4).any()
    torch.testing.assert_close(routing.shares.sum(-1), torch.ones(18))
    assert_equal_to_rounding(y, expected)


def test_ties_go_to_the_first_expert():
    moe = random_moe()
    torch.nn.init.zeros_(moe.router.weight)
    assert moe.route(torch.randn(4, 16)).choice.tolist() == [[0, 1]] * 4


def test_jitter_is_for_the_router_in_training():
    moe = random_moe(jitter=0.5)
    torch.nn.init.eye_(moe.router.weight)
    x = torch.ones(100, 16)
    logits = moe.route(x).logits
    assert 0.5 <= logits.min() < 0.55 and 1.45 < logits.max() <= 1.5
    assert x.eq(1).all() and moe.eval().route(x).logits.eq(1).all()


def test_capacity_drops_the_last():
    """Six tokens, three experts, factor 1: four places each; first choices come first, padding takes none."""
    choice = torch.tensor([[0, 1]] * 5 + [[1, 0]])
    config = MoEConfig(num_experts=3, num_experts_per_tok=2, capacity_factor=1.0)
    kept = fits_capacity(choice, torch.ones(6, dtype=torch.bool), config)
    assert kept.tolist() == [[True, True]] * 3 + [[True, False]] + [[False, False]] + [[True, False]]
    kept = fits_capacity(choice, torch.tensor([False, True, True, True, True, True]), config)
    assert kept.tolist() == [[True, True]] * 3 + [[True, False], [False, False], [True, False]]


def test_dropped_tokens_are_counted():
    """30 tokens and 10 of padding, five experts with room for six: at least half of the 60 choices find none."""
    moe = random_moe(capacity_factor=0.5)
    x, is_token = torch.randn(1, 40, 16), torch.arange(40)[None] < 30
    routing = moe(x, is_token)[1]
    assert routing.weights[30:].min() > 0 and routing.load.sum() == 60

    def count(routing):
        stats = RoutingStats()
        stats.update([routing], is_token, is_token)
        return stats.summary()["dropped_tokens"]

    assert count(routing) == (routing.weights == 0).sum() >= 30
    assert count(moe.eval()(x, is_token)[1]) == 0  # where answers are generated, a token is alone
    routing = random_moe()(1000 * x, is_token)[1]  # a weight of 0 is no dropped token
    assert (routing.weights == 0).any() and count(routing) == 0


# --- balance -------------------------------------------------------------------------------------------------


def make_routing(shares, choice, is_token=None):
    """The routing with these shares [R, E] and chosen experts [R, k]."""
    is_token = torch.ones(len(shares), dtype=torch.bool) if is_token is None else is_token
    load = expert_load(choice, is_token, shares.shape[-1])
    return Routing(shares.log(), shares, choice, shares.gather(-1, choice), torch.ones_like(choice).bool(), load)


def random_routing(seed=0, R=30, E=5, k=2):
    torch.manual_seed(seed)
    shares = (torch.randn(R, E) * 2).softmax(-1)
    return make_routing(shares, shares.topk(k).indices)._replace(logits=shares.log() + torch.randn(R, 1))


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_equals_transformers(masked):
    routing = random_routing()
    is_token = torch.ones(30, dtype=torch.bool)
    is_token[20:] = not masked
    ours = load_balancing_loss(routing.shares, is_token, expert_load(routing.choice, is_token, 5), is_token.sum())
    mask = is_token.view(1, 30).long()
    theirs = modeling_mixtral.load_balancing_loss_func((routing.logits,), 5, 2, mask if masked else None)
    torch.testing.assert_close(ours, theirs)


def test_the_balance_loss_is_least_when_even_and_pushes_there():
    even = torch.eye(4).repeat(3, 1)
    is_token = torch.ones(12, dtype=torch.bool)
    load = expert_load(even.argmax(-1, keepdim=True), is_token, 4)
    assert load_balancing_loss(even, is_token, load, is_token.sum()) == 1
    shares = torch.tensor([[0.7, 0.3]] * 12, requires_grad=True)
    load_balancing_loss(shares, is_token, torch.tensor([12.0, 0.0]), is_token.sum()).backward()
    assert (shares.grad[:, 0] > shares.grad[:, 1]).all()


def test_the_z_loss_is_the_papers():
    routing = random_routing()
    is_token = torch.arange(30) < 20
    expected = routing.logits[:20].double().exp().sum(-1).log().square().mean()
    torch.testing.assert_close(router_z_loss(routing.logits, is_token), expected.float())


def test_the_global_loss_uses_the_load_of_the_whole_step():
    """Two micro-batches, each with one expert alone, are unbalanced one by one and even together."""
    config = MoEConfig(num_experts=2, num_experts_per_tok=1, balance="global_loss", balance_weight=1.0, z_weight=0.0)
    shares = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    extras, local = Extras(), []
    is_token = torch.ones(1, 6, dtype=torch.bool)
    for e in (0, 1):
        s = shares[e].expand(6, 2)
        extras.routing = [make_routing(s, torch.full((6, 1), e))]
        last = router_loss(extras, is_token, config)
        local.append(router_loss(Extras(extras.routing), is_token, dataclasses.replace(config, balance="loss")))
    torch.testing.assert_close(torch.stack(local), torch.tensor([1.8, 1.8]))
    torch.testing.assert_close(last, torch.tensor(1.0))


def test_the_losses_have_their_weights_and_are_means_over_layers():
    routings, is_token = [random_routing(0), random_routing(1)], torch.ones(30, dtype=torch.bool)
    count = is_token.sum()
    even = torch.stack([load_balancing_loss(r.shares, is_token, r.load, count) for r in routings]).mean()
    small = torch.stack([router_z_loss(r.logits, is_token) for r in routings]).mean()

    def loss(balance):
        config = dataclasses.replace(CONFIG, balance=balance, balance_weight=0.3, z_weight=0.2)
        return router_loss(Extras(routings), is_token[None], config)

    for balance in ("loss", "global_loss"):
        torch.testing.assert_close(loss(balance), 0.3 * even + 0.2 * small)
    for balance in ("bias", "none"):
        torch.testing.assert_close(loss(balance), 0.2 * small)


def test_the_objective_weighs_them_as_a_mean_over_trained_tokens(processor):
    """So that dividing by the trained tokens of a step leaves a mean over its micro-batches."""
    batch = make_batch([make_document(processor, 1, ("what?", "red"))])
    with_losses, without = moe_model(balance_weight=0.3), moe_model(balance="none", z_weight=0.0)
    extras = Extras()
    difference = NextToken().loss(with_losses, batch, extras) - NextToken().loss(without, batch)
    expected = router_loss(Extras(extras.routing), batch.doc_ids >= 0, with_losses.config.decoder.moe)
    torch.testing.assert_close(difference / (batch.labels != IGNORE).sum(), expected, rtol=1e-3, atol=0)


def test_the_bias_update_is_the_papers():
    moe = random_moe(balance="bias", bias_rate=0.1)
    torch.nn.init.zeros_(moe.selection_bias)
    moe.update_bias(torch.tensor([7.0, 0.0, 4.0, 5.0, 4.0]))
    torch.testing.assert_close(moe.selection_bias, torch.tensor([-0.1, 0.1, 0.0, -0.1, 0.0]))
    moe.router.requires_grad_(False)  # what is frozen goes on choosing as it did
    moe.update_bias(torch.tensor([7.0, 0.0, 4.0, 5.0, 4.0]))
    torch.testing.assert_close(moe.selection_bias, torch.tensor([-0.1, 0.1, 0.0, -0.1, 0.0]))
    model = moe_model(balance="bias", bias_rate=0.5)
    model.decoder.update_expert_bias(torch.eye(5)[:2])
    for e, layer in enumerate(model.decoder.layers):
        assert layer.mlp.selection_bias.argmin() == e


def test_the_bias_moves_toward_experts_without_tokens():
    moe = random_moe(balance="bias", bias_rate=0.1)
    before = moe.route(torch.randn(400, 16))
    for _ in range(300):
        routing = moe.route(torch.randn(400, 16))
        moe.update_bias(expert_load(routing.choice, torch.ones(400, dtype=torch.bool), 5))
        moe.config = dataclasses.replace(moe.config, bias_rate=moe.config.bias_rate * 0.98)
    after = expert_load(routing.choice, torch.ones(400, dtype=torch.bool), 5)
    assert after.max() < 1.15 * after.mean() < expert_load(before.choice, torch.ones(400, dtype=torch.bool), 5).max()
    assert moe.selection_bias.dtype == torch.float32 and "selection_bias" in moe.state_dict()


# --- statistics ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_batches_together():
    """Two tokens and one of padding, then two; the shares are the numbers in the table, the chosen one is first."""
    stats = RoutingStats()
    for shares, choice, is_token, is_image in (
        ([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], [[0], [1], [0]], [[True, True, False]], [[True, False, True]]),
        ([[0.8, 0.2], [0.5, 0.5]], [[0], [0]], [[True, True]], [[True, False]]),
    ):
        routing = make_routing(torch.tensor(shares), torch.tensor(choice), torch.tensor(is_token)[0])
        stats.update([routing], torch.tensor(is_token), torch.tensor(is_image))
    assert stats.summary() == {
        "expert_load": [[0.75, 0.25]],
        "max_load": [1.5],
        "load_entropy": [round(0.75 * math.log2(4 / 3) + 0.25 * 2, 4)],
        "router_confidence": [round((0.7 + 0.6 + 0.8 + 0.5) / 4, 4)],
        "dropped_tokens": 0,
        "image_share": [[0.6667, 0.0]],
    }


def test_statistics_of_one_expert():
    stats = RoutingStats()
    ones = torch.ones(1, 3, dtype=torch.bool)
    stats.update([make_routing(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))], ones, ones)
    assert stats.summary()["load_entropy"] == [1.0]


# --- in the model --------------------------------------------------------------------------------------------


def moe_model(**changes) -> VLM:
    torch.manual_seed(0)
    return VLM(
        dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=dataclasses.replace(CONFIG, **changes)))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_in_no_statistic_and_no_loss(processor, backend):
    document = make_document(processor, 1, ("what?", "red"))
    model = moe_model(experts=backend)
    results = []
    for length in (len(document), len(document) + 9):
        extras, batch = Extras(), make_batch([document], length)
        model(batch, extras=extras)
        loss = router_loss(extras, batch.doc_ids >= 0, model.config.decoder.moe)
        stats = RoutingStats()
        stats.update(extras.routing, batch.doc_ids >= 0, batch.input_ids == TINY.image_token_id)
        results.append((loss, extras.load, stats))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    images = int((document.input_ids == TINY.image_token_id).sum())
    assert results[1][2].load.sum(1).tolist() == [2 * len(document)] * 2
    assert results[1][2].image_load.sum(1).tolist() == [2 * images] * 2
    summary = results[1][2].summary()
    for share, most in zip(summary["expert_load"], summary["max_load"], strict=True):
        assert sum(share) == pytest.approx(1, abs=1e-3) and most == pytest.approx(5 * max(share), abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_one_document_leaves_the_others_equal(processor, backend):
    """To rounding: with other rows beside it in an expert, a matrix product may add in another order."""
    first, second, other = (make_document(processor, seed, ("what?", "red")) for seed in (1, 2, 3))
    model = moe_model(experts=backend).eval()
    a, b = (model.logits(make_batch([document, second])) for document in (first, other))
    assert not torch.equal(a[:, : len(first)], b[:, : len(first)])
    torch.testing.assert_close(a[:, len(first) :], b[:, len(first) :], rtol=0, atol=1e-5)


def upcycle(dense, moe, noise=0.0):
    """Return a mixture made of a dense model."""
    init.check_upcycling(dense.config.decoder, moe)
    decoder = dataclasses.replace(dense.config.decoder, moe=moe)
    model = empty_model(dataclasses.replace(dense.config, decoder=decoder), "cpu", torch.float32)
    state = dense.state_dict()

    def fill(places):
        assert places.keys() == state.keys()
        for name, place in places.items():
            place.copy_(state[name])

    init.upcycle(model, fill, noise)
    return model.train(dense.training)


def test_layers_that_are_no_mixture_are_dense(processor):
    decoder = dataclasses.replace(TINY.decoder, num_hidden_layers=4, moe=dataclasses.replace(CONFIG, layers=(1, 3)))
    model = VLM(dataclasses.replace(TINY, decoder=decoder))
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers] == ["MLP", "MoE", "MLP", "MoE"]
    assert model.decoder.layers[0].mlp.gate_proj.out_features == TINY.decoder.intermediate_size
    extras, batch = Extras(), make_batch([make_document(processor, 1, ("what?", "red"))])
    NextToken().loss(model, batch, extras).backward()
    assert len(extras.routing) == 2 and extras.load.shape == (2, 5)
    # Of five experts a token uses two, in two layers.
    total, active = model.count_parameters()
    assert total - active == 2 * 3 * (3 * TINY.decoder.hidden_size * 24)


@torch.no_grad()
@pytest.mark.parametrize("layers", [(), (1,)])
def test_an_upcycled_model_computes_what_the_dense_one_does(processor, layers):
    torch.manual_seed(0)
    dense = VLM(TINY).eval()
    batch = make_batch([make_document(processor, seed, ("what?", "red")) for seed in (1, 2)])
    moe = dataclasses.replace(CONFIG, intermediate_size=TINY.decoder.intermediate_size, layers=layers)
    expected = dense.logits(batch)
    same = upcycle(dense, moe)
    routers = [layer.mlp.router.weight for layer in same.decoder.layers if isinstance(layer.mlp, MoE)]
    assert len(routers) == (len(layers) or 2) and (layers or not torch.equal(*routers))
    assert (same.logits(batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_noise_of_upcycling_is_relative_and_another_for_every_expert():
    torch.manual_seed(0)
    dense = VLM(TINY)
    noisy = upcycle(dense, dataclasses.replace(CONFIG, intermediate_size=TINY.decoder.intermediate_size), noise=0.1)
    for old, new in zip(dense.decoder.layers, noisy.decoder.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            matrix, experts = getattr(old.mlp, name).weight, getattr(new.mlp, name)
            noise = (experts - matrix) / matrix.std()
            assert 0.095 < noise.std() < 0.105 and not torch.equal(noise[0], noise[1])
        # The router is that of any new model: standard deviation 1 / sqrt(hidden size).
        assert 0.8 < new.mlp.router.weight.std() * TINY.decoder.hidden_size**0.5 < 1.2
    new, old = noisy.state_dict(), dense.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old if "mlp" not in name or name.startswith("vision"))


@pytest.mark.parametrize(
    ("field", "wanted", "value"),
    [
        ("intermediate_size", 64, 24),
        ("num_shared_experts", 0, 1),
        ("norm_topk_prob", True, False),
        ("routed_scaling_factor", 1.0, 2.5),
        ("capacity_factor", 0.0, 1.0),
    ],
)
def test_a_mixture_that_could_not_compute_the_same_is_refused(field, wanted, value):
    moe = dataclasses.replace(CONFIG, **{"intermediate_size": TINY.decoder.intermediate_size, field: value})
    with pytest.raises(ValueError, match=rf"where decoder.moe.{field} = {wanted}, not {value}"):
        upcycle(VLM(TINY), moe)


def test_upcycled_experts_grow_apart(processor):
    torch.manual_seed(0)
    model = upcycle(VLM(TINY), dataclasses.replace(CONFIG, intermediate_size=TINY.decoder.intermediate_size))
    experts = model.decoder.layers[0].mlp.gate_proj
    assert torch.equal(experts[0], experts[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch([make_document(processor, seed, ("what?", "red")) for seed in (1, 2)])
    NextToken().loss(model, batch).backward()
    optimizer.step()
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("shape", [(12, 6, 8), (3, 8, 6)])
def test_stacked_experts_are_matrices_of_their_own_for_muon(shape):
    torch.manual_seed(0)
    together = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(expert.detach().clone()) for expert in together]
    optimizers = [Muon(parameters, lr=0.1, dtype=torch.float32) for parameters in ([together], *([x] for x in alone))]
    together.grad = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None, None]
    for expert, grad in zip(alone, together.grad, strict=True):
        expert.grad = grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_training_step_updates_the_bias_by_the_load_of_all_its_batches(processor, layers):
    model = moe_model(balance="bias", bias_rate=0.5, layers=layers)
    batches = [make_batch([make_document(processor, seed, ("what?", "red"))]) for seed in (1, 2)]
    load = 0
    for batch in batches:
        model(batch, extras=(extras := Extras()))
        load = load + torch.stack([routing.load for routing in extras.routing])
    config = dataclasses.replace(train.TrainConfig(), model=model.config)
    state = train.TrainState(model, model, make_optimizers(model, config.optim), [], 1, "fp32")
    num_trained = sum(len(batch.trained) for batch in batches)
    train.train_step(state, batches, num_trained, config)
    for layer, counts in zip(model.decoder.layers[-len(load) :], load, strict=True):
        assert torch.equal(layer.mlp.selection_bias, 0.5 * (counts.mean() - counts).sign())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok = 6 must be between 1 and decoder.moe.num_experts = 5"),
        ({"intermediate_size": 0}, "decoder.moe.intermediate_size = 0 must be at least 1"),
        ({"layers": (2,)}, r"decoder.moe.layers = \(2,\) must be indices of the decoder.num_hidden_layers = 2 blocks"),
        ({"layers": (1, 0)}, r"decoder.moe.layers = \(1, 0\) must be indices .* each once and the lowest first"),
        ({"jitter": -0.1}, "decoder.moe.jitter = -0.1 must be at least 0"),
        ({"intermediate_size": 20}, "moe.intermediate_size = 20 must be a multiple of 8 for decoder.moe.experts"),
        ({"experts": "fast"}, "decoder.moe.experts = 'fast' is unknown; there are loop, grouped"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_model(**changes)
    assert VLMConfig().decoder.moe is None


def test_parameters_of_mixtral():
    """46.7 billion, of which 12.9 are active (arXiv 2401.04088), counted without memory for them."""
    decoder = DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        moe=MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=14336),
    )
    with torch.device("meta"):
        model = VLM(VLMConfig(vision=None, image_token_id=None, decoder=decoder))
    total, active = model.count_parameters()
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == (46.7, 12.9)
    assert total == 46_702_792_704  # as transformers counts them


def test_scenes_moe_has_the_active_parameters_of_scenes():
    """But for the routers, of 8 rows a layer."""
    with torch.device("meta"):
        dense, mixture = (VLM(PRESETS[name]().model) for name in ("scenes", "scenes_moe"))
    decoder = dense.config.decoder
    routers = 8 * decoder.hidden_size * decoder.num_hidden_layers
    assert mixture.count_parameters()[1] == dense.count_parameters()[1] + routers


def test_experts_begin_as_a_dense_layer_does():
    layers = VLM(TINY).decoder.layers, moe_model(intermediate_size=TINY.decoder.intermediate_size).decoder.layers
    for name in ("gate_proj", "up_proj", "down_proj"):
        dense, experts = getattr(layers[0][0].mlp, name).weight, getattr(layers[1][0].mlp, name)
        assert 0.9 < experts.std() / dense.std() < 1.1


def test_one_field_switches_it_on():
    assert parse_train(["scenes"]).model.decoder.moe is None
    assert parse_train(["scenes", "--model.decoder.moe.num-experts", "4"]).model.decoder.moe == MoEConfig(4)
