"""A captioning loss beside contrast: its formula, what no caption sees, parts, ranks, and a run that goes on."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from nanovlm.config import ContrastiveConfig, ParallelConfig
from nanovlm.data.dual import DualProcessor, train_text_tokenizer
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import IGNORE
from nanovlm.errors import UserError
from nanovlm.hub.dual import load_dual
from nanovlm.model.dual import Dual
from nanovlm.model.vlm import Extras
from nanovlm.objectives.captions import CaptionDecoder, find_captions
from nanovlm.objectives.contrastive import Contrastive
from nanovlm.tensor_files import read_tensors
from nanovlm.train.parallel import finish_gradients, parallelize
from tests.conftest import noise
from tests.objectives.test_contrastive import DUAL, make_config
from tests.test_train import comparable, metrics

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent.parent
WITH = ContrastiveConfig(caption_weight=2.0)
TEXTS = (
    "a red circle and a blue star",
    "a star",
    "a blue circle",
    "a red star",
    "the blue one",
    "a red, a blue, a star",
)
DUALS = {
    "padded": DUAL,
    "ragged": dataclasses.replace(DUAL, text=dataclasses.replace(DUAL.text, is_padded=False, positions="rotary")),
    "causal, class token": dataclasses.replace(
        DUAL,
        vision=dataclasses.replace(DUAL.vision, class_token=True, num_registers=1),
        text=dataclasses.replace(DUAL.text, is_padded=False, is_causal=True),
        image_pooling="class",
    ),
}


def make_processor(dual=DUAL):
    return DualProcessor(train_text_tokenizer(TEXTS, 300), dual)


def make_both(dual=DUAL, contrastive=WITH):
    torch.manual_seed(0)
    config = make_config("unused", dual=dual, contrastive=contrastive)
    return Dual(dual), Contrastive(config, make_processor(dual))


def make_batch(processor, pairs, row_length=64):
    """A batch of pairs of a text and the seed of a picture, in rows of a few."""
    rows, documents = [], [processor.text_document(text, (noise(seed, 48),)) for text, seed in pairs]
    while documents:
        num = max(n for n in range(1, len(documents) + 1) if sum(map(len, documents[:n])) <= row_length)
        rows.append(make_row(documents[:num], row_length, 0))
        documents = documents[num:]
    return collate(rows)


PAIRS = list(zip(TEXTS, range(6), strict=True))


def caption_losses(model, objective, batch):
    with torch.no_grad():
        return model(batch, beside=objective.read_captions(objective.decoder, model, batch))[2]


# --- the formula ---------------------------------------------------------------------------------------------------


def attend(q, k, v):
    """Each head of [N, H] queries, one a head, over [S, N, H] keys and values."""
    scores = torch.einsum("nh,snh->ns", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("ns,snh->nh", scores.softmax(-1), v).flatten()


def tell(decoder, features, tokens, table):
    """The logits of the token behind `tokens`, position by position, in the dtype of the arguments."""

    def heads(x):
        return x.unflatten(-1, (DUAL.text.num_attention_heads, -1))

    def rms(norm, x):
        return x * norm.weight / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    E, patches = table[tokens], decoder.connector(features)
    E = E - E.mean(1, keepdim=True)
    E = E / (E.square().mean(1, keepdim=True) + 1e-5).sqrt()
    X = list(torch.cat((decoder.begin[None], E)) + decoder.positions[: len(tokens) + 1])
    for layer, kv, cross in zip(decoder.layers, decoder.keys_values, decoder.cross_layers, strict=True):
        a, normed = layer.self_attn, [layer.layer_norm1(x) for x in X]
        k, v = (heads(torch.stack([f(x) for x in normed])) for f in (a.k_proj, a.v_proj))
        X = [
            x + a.out_proj(attend(heads(a.q_proj(n)), k[: i + 1], v[: i + 1]))
            for i, (x, n) in enumerate(zip(X, normed, strict=True))
        ]
        X = [x + layer.mlp(layer.layer_norm2(x)) for x in X]
        k, v = rms(kv.k_norm, heads(kv.k_proj(patches))), heads(kv.v_proj(patches))
        for i, x in enumerate(X):
            q = rms(cross.q_norm, heads(cross.q_proj(rms(cross.input_layernorm, x))))
            x = x + torch.tanh(cross.attn_gate) * cross.o_proj(attend(q, k, v))
            n, m = rms(cross.post_attention_layernorm, x), cross.mlp
            X[i] = x + torch.tanh(cross.mlp_gate) * m.down_proj(F.silu(m.gate_proj(n)) * m.up_proj(n))
    return table @ decoder.head(decoder.norm(X[-1])) / table.square().sum(1).mean().sqrt()


def test_a_loss_is_the_mean_of_what_each_token_costs_after_those_before_it():
    """Written out in fp64, each token by itself from a prefix that ends before it: so none sees what it has to say."""
    decoder, V, D = CaptionDecoder(DUAL, 2, seed=0), 50, DUAL.text.hidden_size
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    captions = torch.tensor([[3, 0, 49, 7, 7], [8, IGNORE, IGNORE, IGNORE, IGNORE], [1, 2, 3, IGNORE, IGNORE]])
    features, table = torch.randn(3, 9, DUAL.vision.hidden_size), 0.1 * torch.randn(V, D)
    found = decoder(features, captions, table).detach()
    decoder, features, table = decoder.double(), features.double(), table.double()
    for own, ids, loss in zip(features, captions, found, strict=True):
        ids = ids[ids >= 0]
        told = [tell(decoder, own, ids[:i], table).log_softmax(-1)[ids[i]] for i in range(len(ids))]
        assert loss.item() == pytest.approx(-sum(told).item() / len(ids), rel=2e-5)


@pytest.mark.parametrize("name", DUALS)
def test_the_loss_of_pairs_is_that_of_contrast_and_of_captions(name):
    """And at first nothing is known: the nats of a token are nearly the logarithm of the vocabulary."""
    (model, objective), extras = make_both(DUALS[name]), Extras()
    batch = make_batch(objective.processor, PAIRS)
    contrast = Contrastive(make_config("unused", dual=DUALS[name]))
    assert contrast.state == {}
    losses = caption_losses(model, objective, batch)
    assert losses.mean() == pytest.approx(torch.tensor(400.0).log().item(), abs=0.5)
    both = objective.loss(model, batch, extras)
    torch.testing.assert_close(both, contrast.loss(model, batch, Extras()) + 2 * losses.sum())
    total, number = extras.means["caption_loss"]
    assert number == 6 and total == losses.sum()


# --- what is seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DUALS)
def test_a_caption_is_told_from_its_own_picture_alone(name):
    """Another text or picture beside it leaves its loss as it is, bit for bit; another picture of its own does not."""
    model, objective = make_both(DUALS[name])
    before, text, picture = (
        caption_losses(model, objective, make_batch(objective.processor, [PAIRS[0], pair, PAIRS[2]]))
        for pair in (("a star", 1), ("a red star", 1), ("a star", 9))
    )
    for after in (text, picture):
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and abs(after[1] - before[1]) > 1e-4


def test_padding_is_not_learned():
    """A caption costs what it does in a tower without padding; its end is learned, also where padding is the same."""
    text = "a red star"
    for dual in (DUAL, dataclasses.replace(DUAL, pad_token_id=2)):  # 2 ends a text
        padded = make_processor(dual)
        ragged = make_processor(dataclasses.replace(dual, text=DUALS["ragged"].text))
        ids = find_captions(padded.encode_texts([text, "a star"]))
        own = ids.masked_fill(padded.find_padding(ids), IGNORE)
        expected = find_captions(ragged.encode_texts([text, "a star"]))
        assert ids.shape == (2, 32) and (own[:, expected.shape[1] :] == IGNORE).all()
        assert torch.equal(own[:, : expected.shape[1]], expected) and expected[0].tolist()[-1] == 2
    assert not ragged.find_padding(expected).any()


# --- parts and ranks -----------------------------------------------------------------------------------------------


def gradients(model, replica, objective, batch, num_ranks=1):
    """All gradients of a step, of the model and of the decoder."""
    (num_ranks * objective.loss(replica, batch, Extras())).backward()
    finish_gradients(model, list(objective.state.values()))
    named = {f"model.{name}": x.grad for name, x in model.named_parameters()}
    named |= {f"decoder.{name}": x.grad for name, x in objective.state.items()}
    return {name: getattr(x, "full_tensor", lambda x=x: x)().clone() for name, x in named.items()}


def assert_same(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name] - x).norm() <= tolerance * x.norm() + 1e-6, name


def test_gradients_in_parts_are_those_of_the_whole_and_reach_all():
    """Of rows that hold unequally many pictures, so that parts of texts are not those of pictures."""
    found = []
    for batch_rows in (9, 1):
        model, objective = make_both(DUALS["ragged"])
        objective.batch_rows = batch_rows
        batch = make_batch(objective.processor, PAIRS, row_length=14)
        assert len(batch.input_ids) > 2
        found.append(gradients(model, model, objective, batch))
    assert_same(found[1], found[0])
    for name, x in found[0].items():
        assert x.any() or name.endswith("k_proj.bias"), name  # which moves no softmax


# One process imports torch and becomes two.
WORKER = """
import multiprocessing
from tests.objectives.test_captions import compute
multiprocessing.set_start_method("fork")
processes = [multiprocessing.Process(target=compute, args=(rank, {folder!r})) for rank in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0
"""
SHARES = {"5 and 1": (PAIRS[:5], PAIRS[5:]), "none and 6": ([], PAIRS)}


def compute(rank, folder):
    """Write the gradients that a rank has after both have taken a step on their own pairs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        for strategy in ("ddp", "fsdp"):
            model, objective = make_both()
            replica = parallelize(model, ParallelConfig(strategy=strategy), torch.device("cpu"), "fp32")
            batch = make_batch(objective.processor, shares[rank] or PAIRS[:1])
            if not shares[rank]:  # a row of padding
                batch = dataclasses.replace(batch, doc_ids=batch.doc_ids * 0 - 1, trained=None)
                batch.pixel_values, batch.tile_doc_ids = batch.pixel_values[:0], batch.tile_doc_ids[:0]
            found = gradients(model, replica, objective, batch, 2)
            save_file(found, f"{folder}/{name}.{strategy}.{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """Those of the pairs of both, each against all, also where a rank has none."""
    worker = [sys.executable, "-c", WORKER.format(folder=str(tmp_path))]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    model, objective = make_both()
    expected = gradients(model, model, objective, make_batch(objective.processor, PAIRS))
    for name in SHARES:
        for strategy in ("ddp", "fsdp"):
            for rank in range(2):
                assert_same(load_file(tmp_path / f"{name}.{strategy}.{rank}.safetensors"), expected)


# --- whole runs ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_a_run_learns_captions_and_goes_on_bit_for_bit_where_it_stopped(tmp_path, monkeypatch):
    """Its published model is a dual model like any other; the decoder is in checkpoints alone."""
    whole, broken = (
        make_config(tmp_path / name, contrastive=dataclasses.replace(WITH, caption_layers=1)) for name in ("one", "two")
    )
    train.main(whole)
    lines = metrics(tmp_path / "one")
    assert lines[-1]["caption_loss"] < lines[0]["caption_loss"] - 0.3 and lines[2]["val_loss"] > 0
    with monkeypatch.context() as patch:
        step = train.train_step

        def stop(state, *args):
            if state.step == 3:
                raise Stop
            return step(state, *args)

        patch.setattr(train, "train_step", stop)
        with pytest.raises(Stop):
            train.main(broken)
    train.main(broken)
    assert comparable(metrics(tmp_path / "two")) == comparable(lines)
    states = [
        read_tensors(tmp_path / name / "checkpoints" / "step_00000006" / "rng.safetensors") for name in ("one", "two")
    ]
    assert "objective.layers.0.mlp.fc1.weight" in states[0] and "objective.begin" in states[0]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    model, _ = load_dual(tmp_path / "one" / "model")
    assert model.state_dict().keys() == Dual(DUAL).state_dict().keys()


def test_a_decoder_leaves_the_random_numbers_of_a_run_as_they_are():
    """So that a model begins with the weights that it has without captions."""
    drawn = []
    for contrastive in (WITH, ContrastiveConfig()):
        torch.manual_seed(0)
        Contrastive(make_config("unused", contrastive=contrastive), make_processor())
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_a_softmax_and_bf16_give_nearly_the_same():
    dual, losses = dataclasses.replace(DUAL, initial_bias=None), []
    for is_rounded in (False, True):
        model, objective = make_both(dual, dataclasses.replace(WITH, loss="softmax"))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            losses.append(objective.loss(model, make_batch(objective.processor, PAIRS), Extras()))
        losses[-1].backward()
        assert all(x.grad.isfinite().all() for x in objective.state.values())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_weight": -1.0}, "contrastive.caption_weight = -1.0 must be at least 0"),
        ({"caption_weight": 1.0, "caption_layers": 0}, "contrastive.caption_layers = 0 must be at least 1"),
        ({"caption_layers": 3}, "contrastive.caption_layers = 3 needs contrastive.caption_weight above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        make_config("unused", contrastive=ContrastiveConfig(**settings)).validate()
