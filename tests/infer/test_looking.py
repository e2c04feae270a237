"""What an answer looked at is what transformers says, for every kind of decoder, and whatever the backend."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

import nanovlm
from nanovlm.config import MoEConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens, place_tiles
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.infer import looking
from nanovlm.infer.looking import choose_means, look, look_response, show_token, split_text, watch_attention
from nanovlm.model.inference import prepare
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.hub.test_export import write_theirs

ANSWER = [40, 300, 7, 511, 40, 99, 123]
QUESTION = [{"role": "user", "content": "what color is the circle?"}]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Let the answers here take several rounds."""
    monkeypatch.setattr(looking, "ROWS", 3)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    ["llama tied, llama3, biases", "qwen2 tied, own head_dim", "qwen3", "smollm3", "mixtral", "olmoe"],
)
def test_attention_is_that_of_transformers(tmp_path, name):
    """With grouped heads, norms of queries and keys, layers without positions, mixtures, and one model in bf16."""
    dtype = torch.bfloat16 if name == "qwen3" else torch.float32
    write_theirs(tmp_path, name, True, dtype)
    model, processor = nanovlm.load(tmp_path)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    images = [noise(0, 300).resize((100, 64)), noise(1)]
    prompt = processor.prompt(QUESTION, images)
    found = look(model, prompt, ANSWER)
    ids = torch.cat((prompt.input_ids, torch.tensor(ANSWER)))
    pixels = normalize(prompt.tiles).to(dtype)
    out = theirs(input_ids=ids[None], pixel_values=pixels[None], output_attentions=True)
    first, is_image = len(prompt) - 1, ids == model.config.image_token_id
    expected = torch.stack(out.attentions)[:, 0, :, first:-1].float()
    close = dict(rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    assert found.to_images.shape == (4, 4, len(ANSWER), 4 * len(prompt.tiles)) and len(prompt.tiles) > 4
    assert found.to_images.dtype == torch.float32
    torch.testing.assert_close(found.to_images, expected[..., is_image], **close)
    torch.testing.assert_close(found.to_text, expected[..., ~is_image].sum(-1), **close)
    sums = found.to_images.sum(-1) + found.to_text
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    logprobs = out.logits[0, first:-1].float().log_softmax(-1)
    close["atol"] *= 10
    torch.testing.assert_close(found.logprobs, logprobs[torch.arange(len(ANSWER)), ANSWER], **close)
    torch.testing.assert_close(found.likeliest_logprobs, logprobs.topk(10).values, **close)
    torch.testing.assert_close(logprobs.gather(1, found.likeliest_ids), found.likeliest_logprobs, **close)
    assert (expected[..., is_image].amax(-1) / expected[..., is_image].amin(-1)).max() > 2  # not flat


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_experts_are_those_of_transformers(tmp_path, name):
    write_theirs(tmp_path, name, False, torch.float32)
    model, processor = nanovlm.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = processor.prompt(QUESTION)
    found = look(model, prompt, ANSWER)
    ids = torch.cat((prompt.input_ids, torch.tensor(ANSWER)))
    out = theirs(input_ids=ids[None], output_router_logits=True)
    logits = torch.stack(out.router_logits).view(4, len(ids), -1)[:, len(prompt) - 1 : -1]
    k = model.config.decoder.moe.num_experts_per_tok
    assert found.experts.equal(logits.topk(k).indices) and len(found.experts.unique()) > 1
    shares = logits.softmax(-1).topk(k).values
    shares = shares / shares.sum(-1, keepdim=True) if name == "mixtral" else shares
    torch.testing.assert_close(found.expert_weights, shares)
    assert found.to_images.shape[-1] == 0 and (found.to_text - 1).abs().max() < 1e-5


@torch.inference_mode()
def test_looking_leaves_the_model_as_it_is(model, processor):
    """Every backend computes the same to the bit while it is watched, and afterwards nothing watches."""
    prompt = processor.prompt(QUESTION, [noise(0), noise(1)])
    batch, backends = processor.batch([prompt]), [layer.self_attn.attend for layer in model.decoder.layers]
    hidden, seen = model(batch), []
    with watch_attention(model, 4, lambda *what: seen.append(what)):
        assert model(batch).equal(hidden)
    assert [(layer, start) for layer, start, _ in seen] == [(i, s) for i in range(len(backends)) for s in (0, 3)]
    with pytest.raises(RuntimeError, match="while"), watch_attention(model, 4, print):
        raise RuntimeError("while watching")
    assert [layer.self_attn.attend for layer in model.decoder.layers] == backends
    found = look(model, prompt, ANSWER)
    sdpa = VLM(dataclasses.replace(model.config, decoder=dataclasses.replace(model.config.decoder, attention="sdpa")))
    sdpa.load_state_dict(model.state_dict())
    for name, values in vars(look(sdpa.eval(), prompt, ANSWER)).items():
        torch.testing.assert_close(getattr(found, name), values, rtol=0, atol=1e-5)


def test_a_prepared_model_looks_at_the_same(processor):
    torch.manual_seed(0)
    model, prompt = VLM(TINY).eval(), processor.prompt(QUESTION, [noise(0), noise(1)])
    expected = look(model, prompt, ANSWER)
    found = look(prepare(model), prompt, ANSWER)
    assert all(layer.self_attn.joined is not None for layer in model.decoder.layers)
    for name in ("to_images", "to_text", "logprobs", "likeliest_ids"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_means(processor):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16)
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))).eval()
    prompt = processor.prompt(QUESTION, [noise(0), noise(1)])
    each, heads, layers = (look(model, prompt, ANSWER, means) for means in ("none", "heads", "layers"))
    for name in ("to_images", "to_text"):
        expected = getattr(each, name).mean(1, keepdim=True)
        torch.testing.assert_close(getattr(heads, name), expected)
        torch.testing.assert_close(getattr(layers, name), expected.mean(0, keepdim=True))
    assert layers.experts.shape == (2, len(ANSWER), 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "there is no answer to look at"),
        ([5, 512], "token 512 cannot stand in an answer"),
        ([5, -1], "token -1 cannot"),
        ([TINY.image_token_id], "token 1 cannot"),
        ([5] * 8192, "more than the model's 8192 positions"),
    ],
)
def test_answers_that_no_model_gives(processor, answer, message):
    with pytest.raises(UserError, match=message):
        look(VLM(TINY), processor.prompt(QUESTION, [noise(0)]), answer)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["images", "prompt"])
def test_what_prefix_attention_sees_is_looked_at(processor, kind, monkeypatch):
    """The values of a layer, by the weights of the queries, are what the layer computes for them."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, prefix_attention=kind))
    model, theirs = VLM(config).eval(), Processor(processor.tokenizer, CHAT_TEMPLATE, config)
    prompt, weights, passes = theirs.prompt(QUESTION, [noise(0)]), [], []
    attention = model.decoder.layers[0].self_attn
    attend, weigh = attention.attend, looking.attention_weights
    attention.attend = lambda *args: passes.append((args[2], attend(*args))) or passes[-1][1]
    monkeypatch.setattr(looking, "attention_weights", lambda *args: weights.append(weigh(*args)) or weights[-1])
    look(model, prompt, ANSWER)
    (values, out), of_layer = passes[0], torch.cat(weights[:3], 1)  # three rounds a layer
    expected = of_layer @ values[0].repeat_interleave(2, 1).transpose(0, 1)
    torch.testing.assert_close(out[0, len(prompt) - 1 :].transpose(0, 1), expected, rtol=0, atol=1e-5)
    assert prompt.span_ids is not None and bool(prompt.span_ids.any())


# ---- as JSON ----


def read(text, dtype, *shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).copy()).view(shape)


@pytest.fixture(scope="module")
def mixture():
    """A mixture of experts that cuts pictures into tiles, and its processor."""
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16)
    config = dataclasses.replace(
        TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe), tiling=TilingConfig("fit", max_tiles=4)
    )
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(config))
    return VLM(config).eval(), Processor(tokenizer, CHAT_TEMPLATE, config)


def test_a_response_says_what_was_found(mixture):
    model, processor = mixture
    images = [noise(0, 64).resize((40, 20)), noise(1)]
    answer = processor.encode_answer("a red \U0001f642 circle")
    found = look(model, processor.prompt(QUESTION, images), answer)
    told = told_of(model, processor, images, answer)
    assert [(image["width"], image["height"]) for image in told["images"]] == [(40, 20), (16, 16)]
    places = [(i, place) for i, image in enumerate(images) for place in place_tiles(*image.size, model.config)]
    assert [(t["image"], *t["box"], t["whole"]) for t in told["tiles"]] == [(i, *place) for i, place in places]
    assert told["grid"] ** 2 * len(told["tiles"]) == found.to_images.shape[-1] and len(told["tiles"]) > 3
    attention, shape = told["attention"], found.to_images.shape
    assert (attention["layers"], attention["heads"], attention["mean"]) == (2, 4, "none")
    assert read(attention["text"], "<f4", *shape[:-1]).equal(found.to_text)
    peaks = read(attention["peaks"], "<f4", *shape[:-1])
    assert peaks.equal(found.to_images.amax(-1))
    weights = read(attention["weights"], "u1", *shape) / 255 * peaks[..., None]
    assert ((weights - found.to_images).abs() <= peaks[..., None] / 500).all()
    assert "".join(token["text"] for token in told["tokens"]) == "a red \U0001f642 circle" and told["left_out"] == 0
    for token, number, logprob, ids in zip(
        told["tokens"], answer, found.logprobs.tolist(), found.likeliest_ids.tolist(), strict=True
    ):
        assert (token["id"], token["logprob"]) == (number, logprob) and len(token["likeliest"]) == 10
        assert [(i, text) for i, text, _ in token["likeliest"]] == [(i, show_token(i, processor)) for i in ids]
    assert told["experts"]["count"] == 3
    assert torch.tensor(told["experts"]["chosen"]).equal(found.experts.transpose(0, 1))
    assert torch.tensor(told["experts"]["weights"]).equal(found.expert_weights.transpose(0, 1))


def test_a_dense_layer_among_mixtures_has_no_experts(processor):
    moe = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, layers=(1,))
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))).eval()
    found, told = look(model, processor.prompt(QUESTION, []), ANSWER), told_of(model, processor, [], ANSWER)["experts"]
    assert told["chosen"] == [[[], ids] for ids in found.experts[0].tolist()]
    assert told["weights"] == [[[], shares] for shares in found.expert_weights[0].tolist()]


def told_of(model, processor, images, answer):
    prompt = processor.prompt(QUESTION, images)
    return json.loads(json.dumps(look_response(model, processor, prompt, [image.size for image in images], answer)))


def test_a_response_is_small(mixture, monkeypatch):
    """Means are taken before anything is left out."""
    assert choose_means(30, 9, 100 * 64) == "none" and choose_means(30, 9, 100 * 640) == "heads"
    model, processor = mixture
    answer = processor.encode_answer("a red circle and a blue one")
    each = told_of(model, processor, [noise(0)], answer)["attention"]
    A, P = len(answer), 4
    for most, mean, num in ((8 * A * P, "none", 8), (2 * A * P, "heads", 2), (2 * A * P - 1, "layers", 1)):
        monkeypatch.setattr(looking, "MOST_WEIGHTS", most)
        told = told_of(model, processor, [noise(0)], answer)
        weights, peaks = told["attention"]["weights"], told["attention"]["peaks"]
        assert told["attention"]["mean"] == mean and told["left_out"] == 0
        assert len(base64.b64decode(weights)) == num * A * P and len(base64.b64decode(peaks)) == 4 * num * A
    whole = (read(each["weights"], "u1", 8, A, P) / 255 * read(each["peaks"], "<f4", 8, A, 1)).mean(0)
    mean = read(weights, "u1", A, P) / 255 * read(peaks, "<f4", A, 1)
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.005)
    monkeypatch.setattr(looking, "MOST_WEIGHTS", 3 * P)
    assert len(told_of(model, processor, [noise(0)], answer)["tokens"]) == 3
    monkeypatch.setattr(looking, "MOST_TOKENS", 2)
    told = told_of(model, processor, [noise(0)], answer)
    assert len(told["tokens"]) == 2 and told["left_out"] == A - 2


def test_a_response_about_text_alone(processor):
    told = told_of(VLM(TINY).eval(), processor, [], ANSWER)
    assert told["images"] == told["tiles"] == [] and told["experts"] is None
    assert told["attention"]["weights"] == "" and read(told["attention"]["peaks"], "<f4", 2, 4, 7).abs().max() == 0
    assert (read(told["attention"]["text"], "<f4", 2, 4, 7) - 1).abs().max() < 1e-5


def test_texts_of_tokens(processor):
    ids = processor.encode_answer("red \U0001f642!")
    texts = split_text(ids, processor)
    assert "".join(texts) == "red \U0001f642!" and "" in texts and not any("\ufffd" in text for text in texts)
    assert show_token(processor.config.eos_token_id, processor) == "<end_of_utterance>"
    assert show_token(processor.encode_answer("is red")[-1], processor) == " red"
    part = ids[texts.index("")]
    assert show_token(part, processor) == processor.tokenizer.id_to_token(part)
    assert split_text(ids[: texts.index("") + 1], processor)[-1] == "\ufffd"  # an answer that was cut
