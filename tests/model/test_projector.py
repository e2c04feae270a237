"""Every projector: how many tokens, what they depend on, and that a model with it learns, answers and is stored."""

import dataclasses

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

import nanovlm
from nanovlm.config import ProjectorConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import IGNORE
from nanovlm.errors import UserError
from nanovlm.hub.export import check_exportable
from nanovlm.infer.looking import look
from nanovlm.model import projector
from nanovlm.model.projector import PROJECTORS, QFormer, Resampler, merge_tokens
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.model.test_parity import assert_close, randomize
from tests.test_train import SMALL, metrics, run

IN_SQUARES = ("linear", "mlp", "merger", "pool")


def config_of(name, num_tokens=3, **settings):
    return ProjectorConfig(type=name, num_tokens=0 if name in IN_SQUARES else num_tokens, **settings)


def make_model(name, **settings):
    torch.manual_seed(0)
    return VLM(dataclasses.replace(TINY, projector=config_of(name, **settings)))


@pytest.mark.parametrize("name", PROJECTORS)
def test_it_makes_as_many_tokens_as_the_config_says(name):
    settings = [{"scale_factor": s} for s in (1, 2, 4)] if name in IN_SQUARES else [{"num_tokens": n} for n in (1, 7)]
    for setting in settings:
        model = make_model(name, **setting)
        tokens = model.config.num_image_tokens
        assert tokens == setting.get("num_tokens", 16 // setting.get("scale_factor", 2) ** 2)
        tiles = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
        out = model.encode(tiles)
        assert out.shape == (5, tokens, 32)
        assert torch.allclose(out[1:3], model.encode(tiles[1:3]), atol=1e-6)  # a tile by itself
        assert model.encode(tiles[:0]).shape == (0, tokens, 32)


@pytest.mark.parametrize(("name", "num_tokens"), [("linear", 5), ("mlp", 4), ("resampler", 0), ("merge", 17)])
def test_another_number_of_tokens_is_refused(name, num_tokens):
    if (name, num_tokens) == ("mlp", 4):
        assert VLM(dataclasses.replace(TINY, projector=ProjectorConfig(name, num_tokens=4)))  # as many as it makes
        return
    right = "say how many it is to make" if name == "resampler" else "give it "
    message = rf"projector.num_tokens = {num_tokens} does not fit projector.type = '{name}', which makes .*: {right}"
    with pytest.raises(UserError, match=message):
        VLM(dataclasses.replace(TINY, projector=ProjectorConfig(name, num_tokens=num_tokens)))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match=r"projector.num_attention_heads = 5 must divide vision.hidden_size = 32"):
        make_model("qformer", num_attention_heads=5)


@pytest.mark.parametrize("name", PROJECTORS)
def test_gradients_reach_every_parameter_and_every_patch(name):
    model = make_model(name)
    x = torch.randn(2, 16, 32, requires_grad=True)
    (model.projector(x) * torch.randn(2, model.config.num_image_tokens, 32)).sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    for key, parameter in model.projector.named_parameters():
        # The bias of keys adds the same to every score of a query.
        assert key.endswith("k_proj.bias") or parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["resampler", "qformer"])
def test_latents_do_not_depend_on_the_order_of_the_features(name):
    part, x = make_model(name).projector, torch.randn(2, 16, 32)
    assert torch.allclose(part(x), part(x[:, torch.randperm(16)]), atol=1e-5)
    other = x.clone()
    other[:, 9] = 3 * torch.randn(32)
    assert not torch.allclose(part(x), part(other), atol=1e-3)


@torch.no_grad()
def test_the_resampler_equals_that_of_idefics(monkeypatch):
    """Which has ReLU for GELU."""
    torch.manual_seed(0)
    theirs = IdeficsPerceiverResampler(IdeficsConfig(vision_config={"embed_dim": 48}), 48, 3, 4, 12, 5)
    randomize(theirs)
    ours = Resampler(ProjectorConfig("resampler", 2, num_tokens=5, num_layers=3), 48, 20)
    norms = {"context_layer_norm": "features_norm", "latents_layer_norm": "latents_norm"}
    names = {"latents": "latents.weight", "layer_norm.weight": "norm.weight", "layer_norm.bias": "norm.bias"}
    for key in theirs.state_dict():
        if key.startswith("blocks."):
            _, number, half, part, *kind = key.split(".")
            part = {"ln": "mlp_norm", "fc": "fc1", "c_proj": "fc2", "output_proj": "out_proj"}.get(part, part)
            attn = "attn." if half == "0" and part not in norms else ""
            names[key] = f"layers.{number}.{attn}{norms.get(part, part)}.{'.'.join(kind)}"
    ours.load_state_dict({names[key]: x for key, x in theirs.state_dict().items()} | {"proj.weight": ours.proj.weight})
    monkeypatch.setattr(projector.F, "gelu", torch.relu)
    x = torch.randn(2, 9, 48)
    assert_close(ours(x), ours.proj(theirs(x)))


@torch.no_grad()
def test_the_qformer_equals_that_of_blip2():
    torch.manual_seed(0)
    shared = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(**shared, cross_attention_frequency=1, encoder_hidden_size=48, layer_norm_eps=1e-5)
    ).eval()
    randomize(theirs)
    ours = QFormer(ProjectorConfig("qformer", 2, num_tokens=5, num_layers=3), 48, 20)
    names = {
        "layernorm": "norm",
        **{
            f"encoder.layer.{i}.{block}.{part}": f"layers.{i}.{name}_attn.{to}"
            for i in range(3)
            for block, name in (("attention", "self"), ("crossattention", "cross"))
            for part, to in (
                *((f"attention.{x}", f"{x[0]}_proj") for x in ("query", "key", "value")),
                ("output.dense", "out_proj"),
            )
        },
        **{
            f"encoder.layer.{i}.{part}": f"layers.{i}.{to}"
            for i in range(3)
            for part, to in (
                ("attention.output.LayerNorm", "self_norm"),
                ("crossattention.output.LayerNorm", "cross_norm"),
                ("intermediate_query.dense", "fc1"),
                ("output_query.dense", "fc2"),
                ("output_query.LayerNorm", "mlp_norm"),
            )
        },
    }
    weights = {}
    for key, x in theirs.state_dict().items():
        name, _, kind = key.rpartition(".")
        if name in names:  # what is left reads text
            weights[f"{names[name]}.{kind}"] = x
    own = {key: x for key, x in ours.state_dict().items() if key.startswith(("queries", "proj"))}
    ours.load_state_dict(weights | own)
    x = torch.randn(2, 9, 48)
    queries = ours.queries.weight.expand(2, -1, -1)
    assert_close(ours(x), ours.proj(theirs(query_embeds=queries, encoder_hidden_states=x).last_hidden_state))


def merge_slowly(x, num_tokens):
    """One tile, by section 3 of arXiv 2210.09461: sets A and B, an edge each, the r most similar are merged."""
    tokens = [(x[i].double(), 1) for i in range(len(x))]
    while len(tokens) > num_tokens:
        a, b = tokens[::2], tokens[1::2]
        edges = []
        for i, (u, _) in enumerate(a):
            likeness = [float(torch.cosine_similarity(u, v, dim=0)) for v, _ in b]
            edges.append((max(likeness), i, likeness.index(max(likeness))) if b else None)
        edges = sorted(edges, key=lambda edge: -edge[0])[: min(len(tokens) - num_tokens, len(tokens) // 2)]
        sums = [(v * size, size) for v, size in b]
        for _, i, j in edges:
            sums[j] = (sums[j][0] + a[i][0] * a[i][1], sums[j][1] + a[i][1])
        gone = {i for _, i, _ in edges}
        tokens = [
            token
            for i in range(len(a))
            for token in ([] if i in gone else [a[i]]) + ([(sums[i][0] / sums[i][1], sums[i][1])] if i < len(b) else [])
        ]
    return torch.stack([u for u, _ in tokens]), [size for _, size in tokens]


@pytest.mark.parametrize(
    ("num_patches", "num_tokens"), [(16, 16), (16, 15), (16, 8), (16, 3), (25, 7), (9, 1), (3, 2), (1, 1)]
)
def test_merging_equals_the_paper(num_patches, num_tokens):
    torch.manual_seed(num_patches)
    x = torch.randn(3, num_patches, 6)
    merged, sizes = merge_tokens(x, num_tokens)
    assert merged.shape == (3, num_tokens, 6) and (sizes.sum(1) == num_patches).all()
    for tile in range(3):
        expected, theirs = merge_slowly(x[tile], num_tokens)
        assert sizes[tile].tolist() == theirs
        torch.testing.assert_close(merged[tile].double(), expected, rtol=1e-5, atol=1e-5)


def test_equal_patches_are_merged_first():
    """And their mean is one of them; what is unlike all others stays as it is."""
    x = torch.eye(8)[torch.tensor([0, 0, 3, 0, 5, 0, 0, 0])][None]
    merged, sizes = merge_tokens(x, 6)
    assert {tuple(v) for v in merged[0].tolist()} == {tuple(torch.eye(8)[i].tolist()) for i in (0, 3, 5)}
    assert sizes.sum() == 8


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTORS)
def test_answers_with_a_cache_are_those_without(name, processor):
    model = make_model(name)
    own = Processor(processor.tokenizer, processor.chat_template, model.config)
    prompt = own.prompt([{"role": "user", "content": "what?"}], [noise(0), noise(1)])
    answer = nanovlm.generate(model, own.batch([prompt]), max_new_tokens=6)[0]
    ids = prompt.input_ids
    for token in answer:
        fields = {"labels": torch.full_like(ids, IGNORE), "branch_ids": torch.zeros_like(ids).int()}
        batch = own.batch([dataclasses.replace(prompt, input_ids=ids, **fields)])
        assert token == model.logits(batch)[0, -1].argmax()
        ids = torch.cat((ids, torch.tensor([token])))


@pytest.mark.parametrize("name", [name for name in PROJECTORS if name != "linear"])
def test_a_run_learns_with_it_and_its_folder_has_it(name, tmp_path):
    model = dataclasses.replace(SMALL.model, projector=config_of(name, num_tokens=5, scale_factor=3))
    run(tmp_path, model=model, optim=dataclasses.replace(SMALL.optim, steps=2), precision="fp32")
    assert [line["loss"] > 0 and line["grad_norm"] > 0 for line in metrics(tmp_path)][:2] == [True, True]
    loaded, processor = nanovlm.load(tmp_path / "model")
    assert loaded.config.projector == model.projector
    with pytest.raises(UserError, match=rf"projector.type = '{name}' cannot be exported: Idefics3"):
        check_exportable(processor)
    document = processor.prompt([{"role": "user", "content": "what?"}], [noise(0, 64)])
    if name not in IN_SQUARES:
        with pytest.raises(UserError, match=rf"the 5 image tokens of projector.type = '{name}' are of no place"):
            look(loaded, document, [7, 8])
