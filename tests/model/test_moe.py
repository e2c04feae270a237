"""The mixture of experts: backends equal the loop, routing and losses equal transformers' and the papers' formulas."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

import train
from nanovlm.config import DecoderConfig, MoEConfig, VLMConfig
from nanovlm.init import upcycle
from nanovlm.losses import expert_load, load_balancing_loss, router_loss, router_z_loss
from nanovlm.metrics import RoutingStats
from nanovlm.model.moe import EXPERTS, MoE, Routing, fits_capacity
from nanovlm.model.vlm import VLM
from nanovlm.objectives import next_token
from nanovlm.optim import as_matrices
from tests.conftest import TINY, make_batch, make_document

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
    """Output of a backend, and the gradients of a fixed sum of it for x, weights and the three matrices."""
    x, choice, *rest = inputs
    x, *rest = (t.to(dtype).requires_grad_() for t in (x, *rest))
    y = EXPERTS[backend](x, choice, *rest)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *rest))]


def assert_equals_the_loop(backend, choice, num_experts, seed=0, D=16, W=24):
    """Against the loop in fp64, no further off than twice the loop in fp32 and a rounding floor."""
    generator = torch.Generator().manual_seed(seed)
    R, k = choice.shape
    shapes = [(R, k), (num_experts, W, D), (num_experts, W, D), (num_experts, D, W)]
    x, *rest = (torch.randn(shape, generator=generator) for shape in [(R, D), *shapes])
    inputs = (x, choice, *rest)
    exact = with_gradients("loop", inputs, torch.float64)
    for name, ours, loop, truth in zip(
        ("output", "x", "weights", "gate", "up", "down"),
        with_gradients(backend, inputs, torch.float32),
        with_gradients("loop", inputs, torch.float32),
        exact,
        strict=True,
    ):
        if truth.numel():
            floor = 4 * torch.finfo(torch.float32).eps * max(truth.abs().max().item(), 1)
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


@pytest.mark.parametrize("backend", EXPERTS)
@pytest.mark.parametrize("case", CASES)
def test_backends_equal_the_loop(backend, case):
    choice, num_experts = CASES[case]
    assert_equals_the_loop(backend, torch.tensor(choice), num_experts)


@pytest.mark.parametrize("backend", EXPERTS)
def test_zero_tokens(backend):
    assert_equals_the_loop(backend, torch.empty(0, 2, dtype=torch.int64), 3)


@pytest.mark.parametrize("backend", sorted(EXPERTS.keys() - {"loop"}))
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


@pytest.mark.parametrize("backend", EXPERTS)
def test_weights_of_zero_and_bf16(backend):
    """Under autocast the output has the dtype of x, and is as near to fp32 as the loop's is."""
    moe = random_moe(experts=backend)
    x = torch.randn(2, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    exact = random_moe(experts="loop")(x)[0]
    assert y.dtype == torch.float32 and routing.logits.dtype == torch.float32
    assert (y - exact).abs().max() < 0.03 * exact.abs().max()


# --- routing -------------------------------------------------------------------------------------------------


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
    assert (moe.eval()(x)[0] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_sigmoid_scores_bias_and_shared_experts_follow_deepseek():
    """Selection by score plus bias, weights by score alone, normalised and scaled (arXiv 2412.19437, eq. 12 to 16)."""
    changes = dict(scores="sigmoid", balance="bias", routed_scaling_factor=2.5, num_shared_experts=1)
    moe = random_moe(**changes)
    moe.selection_bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, -3.0]))
    x = torch.randn(1, 6, 16)
    y, routing = moe(x)
    scores = torch.sigmoid(x[0] @ moe.router.weight.T)
    assert (routing.choice == 1).sum(1).eq(1).all() and not (routing.choice == 4).any()
    for row in range(6):
        expected = moe.shared(x[0, row])
        chosen = (scores[row] + moe.selection_bias).topk(2).indices
        total = scores[row, chosen].sum()
        for e in chosen:
            hidden = torch.nn.functional.silu(moe.gate_proj[e] @ x[0, row]) * (moe.up_proj[e] @ x[0, row])
            expected = expected + 2.5 * scores[row, e] / total * (moe.down_proj[e] @ hidden)
        assert (y[0, row] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ties_go_to_the_first_expert():
    moe = random_moe()
    torch.nn.init.zeros_(moe.router.weight)
    assert moe.route(torch.randn(4, 16)).choice.tolist() == [[0, 1]] * 4


def test_jitter_is_for_training_alone():
    moe = random_moe(jitter=0.5)
    x = torch.randn(4, 16)
    assert not torch.equal(moe.route(x).logits, moe.route(x).logits)
    moe.eval()
    assert torch.equal(moe.route(x).logits, moe.route(x).logits)


def test_capacity_drops_the_last_and_counts_them():
    """Six tokens, three experts, factor 1: four places each; first choices come first, padding takes none."""
    choice = torch.tensor([[0, 1]] * 5 + [[1, 0]])
    kept = fits_capacity(choice, None, MoEConfig(num_experts=3, num_experts_per_tok=2, capacity_factor=1.0))
    assert kept.tolist() == [[True, True]] * 3 + [[True, False]] + [[False, False]] + [[True, False]]
    is_token = torch.tensor([False, True, True, True, True, True])
    kept = fits_capacity(choice, is_token, MoEConfig(num_experts=3, num_experts_per_tok=2, capacity_factor=0.9))
    assert kept[1:].tolist() == [[True, True]] * 2 + [[True, False], [False, False], [True, False]]
    moe = random_moe(capacity_factor=0.5)
    x = torch.randn(1, 40, 16)
    routing = moe(x)[1]
    stats = RoutingStats()
    stats.update([routing], torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.bool))
    dropped = stats.summary()["dropped_tokens"]
    assert dropped == (routing.weights == 0).sum() >= 40
    assert random_moe(capacity_factor=5.0)(x)[1].weights.min() > 0


# --- balance -------------------------------------------------------------------------------------------------


def random_routing(seed=0, R=30, E=5, k=2):
    torch.manual_seed(seed)
    logits = torch.randn(R, E) * 2
    shares = logits.softmax(-1)
    return Routing(logits, shares, shares.topk(k).indices, shares.topk(k).values)


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
    torch.testing.assert_close(router_z_loss(routing.logits, is_token).double(), expected)


def test_the_global_loss_uses_the_load_of_the_whole_step():
    """Two micro-batches, each with one expert alone, are unbalanced one by one and even together."""
    config = MoEConfig(num_experts=2, num_experts_per_tok=1, balance="global_loss", balance_weight=1.0, z_weight=0.0)
    shares = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    extras, local = {}, []
    is_token = torch.ones(1, 6, dtype=torch.bool)
    for e in (0, 1):
        s = shares[e].expand(6, 2)
        extras["routing"] = [Routing(s.log(), s, torch.full((6, 1), e), s[:, :1])]
        last = router_loss(extras, is_token, config)
        local.append(router_loss({"routing": extras["routing"]}, is_token, dataclasses.replace(config, balance="loss")))
    torch.testing.assert_close(torch.stack(local), torch.tensor([1.8, 1.8]))
    torch.testing.assert_close(last, torch.tensor(1.0))


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


# --- in the model --------------------------------------------------------------------------------------------


def moe_model(**changes) -> VLM:
    torch.manual_seed(0)
    return VLM(
        dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=dataclasses.replace(CONFIG, **changes)))
    )


@pytest.mark.parametrize("backend", EXPERTS)
def test_padding_is_in_no_statistic_and_no_loss(processor, backend):
    document = make_document(processor, 1, ("what?", "red"))
    model = moe_model(experts=backend)
    results = []
    for length in (len(document), len(document) + 9):
        extras, batch = {}, make_batch([document], length)
        model(batch, extras=extras)
        loss = router_loss(extras, batch.doc_ids >= 0, model.config.decoder.moe)
        stats = RoutingStats()
        stats.update(extras["routing"], batch.doc_ids >= 0, batch.input_ids == TINY.image_token_id)
        results.append((loss, extras["load"], stats))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    images = int((document.input_ids == TINY.image_token_id).sum())
    assert results[1][2].load.sum(1).tolist() == [2 * len(document)] * 2
    assert results[1][2].image_load.sum(1).tolist() == [2 * images] * 2
    summary = results[1][2].summary()
    for share, most in zip(summary["expert_load"], summary["max_load"], strict=True):
        assert sum(share) == pytest.approx(1, abs=1e-3) and most == pytest.approx(5 * max(share), abs=1e-3)


@pytest.mark.parametrize("backend", EXPERTS)
def test_changing_one_document_leaves_the_others_equal(processor, backend):
    """To rounding: with other rows beside it in an expert, a matrix product may add in another order."""
    first, second, other = (make_document(processor, seed, ("what?", "red")) for seed in (1, 2, 3))
    model = moe_model(experts=backend).eval()
    a, b = (model.logits(make_batch([document, second])) for document in (first, other))
    assert not torch.equal(a[:, : len(first)], b[:, : len(first)])
    torch.testing.assert_close(a[:, len(first) :], b[:, len(first) :], rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_upcycled_model_computes_what_the_dense_one_does(processor):
    torch.manual_seed(0)
    dense = VLM(TINY).eval()
    batch = make_batch([make_document(processor, seed, ("what?", "red")) for seed in (1, 2)])
    moe = dataclasses.replace(CONFIG, intermediate_size=TINY.decoder.intermediate_size)
    expected = dense.logits(batch)
    assert (upcycle(dense, moe).logits(batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    noisy = upcycle(dense, moe, noise=0.1)
    experts = noisy.decoder.layers[0].mlp.gate_proj
    spread = (experts - dense.decoder.layers[0].mlp.gate_proj.weight).std() / experts[0].std()
    assert 0.05 < spread < 0.15 and not torch.equal(experts[0], experts[1])
    with pytest.raises(ValueError, match=r"where decoder.moe.intermediate_size = 64, not 24"):
        upcycle(dense, CONFIG)


def test_upcycled_experts_grow_apart(processor):
    torch.manual_seed(0)
    model = upcycle(VLM(TINY), dataclasses.replace(CONFIG, intermediate_size=TINY.decoder.intermediate_size))
    experts = model.decoder.layers[0].mlp.gate_proj
    assert torch.equal(experts[0], experts[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch([make_document(processor, seed, ("what?", "red")) for seed in (1, 2)])
    next_token(model, batch, {}).backward()
    optimizer.step()
    assert not torch.equal(experts[0], experts[1])


def test_stacked_experts_are_matrices_of_their_own_for_muon():
    experts, conv, linear = torch.randn(4, 6, 8), torch.randn(5, 3, 2, 2), torch.randn(5, 7)
    assert as_matrices(experts).shape == (4, 6, 8)
    assert as_matrices(conv).shape == (1, 5, 12) and as_matrices(linear).shape == (1, 5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok = 6 must be between 1 and decoder.moe.num_experts = 5"),
        ({"intermediate_size": 0}, "decoder.moe.intermediate_size = 0 must be at least 1"),
        ({"jitter": -0.1}, "decoder.moe.jitter = -0.1 must be at least 0"),
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


def test_one_field_switches_it_on():
    assert train.parse_config(["scenes"]).model.decoder.moe is None
    assert train.parse_config(["scenes", "--model.decoder.moe.num-experts", "4"]).model.decoder.moe == MoEConfig(4)
