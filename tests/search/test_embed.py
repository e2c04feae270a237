"""Vectors of decoders equal the published recipe on transformers' model; those of dual models are the model's own."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import processors

from nanovlm.config import DualConfig, ProjectorConfig, TextConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.dual import DualProcessor
from nanovlm.data.tokenizer import CHAT_TEMPLATE
from nanovlm.errors import UserError
from nanovlm.hub.dual import save_dual
from nanovlm.hub.model_folder import save_model
from nanovlm.model.dual import Dual
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM
from nanovlm.search import embed
from nanovlm.search.embed import INSTRUCTION, embedder_of, fingerprint, open_embedder
from tests.conftest import TINY, noise
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["what color is the circle?", "red", "the red circle is left of the blue square. " * 9, "how many squares?"]


def last_token_pool(last_hidden_states, attention_mask):
    """What the page of Qwen3-Embedding says, for padding on the left."""
    assert attention_mask[:, -1].sum() == attention_mask.shape[0]
    return last_hidden_states[:, -1]


def save_qwen(folder, processor):
    """A random Qwen3-Embedding: without head and prefix, its tokenizer puts an end token behind every text."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3Model(config)
    randomize(model, 1.0)
    model.eval().save_pretrained(folder)
    tokenizer = type(processor.tokenizer).from_str(processor.tokenizer.to_str())
    end = "<end_of_utterance>"
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end, "pad_token": "<|pad|>"}))
    return model, tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *save_qwen(folder, processor)


@torch.inference_mode()
def test_a_decoder_embeds_as_qwen3_embedding_does(qwen):
    folder, model, tokenizer = qwen
    tokenizer.enable_padding(direction="left", pad_id=0)
    task = "Given a web search query, retrieve relevant passages that answer the query"
    texts = [f"Instruct: {task}\nQuery:{TEXTS[0]}", *TEXTS]
    encoded = tokenizer.encode_batch(texts)
    mask = torch.tensor([x.attention_mask for x in encoded])
    outputs = model(input_ids=torch.tensor([x.ids for x in encoded]), attention_mask=mask)
    truth = F.normalize(last_token_pool(outputs.last_hidden_state, mask), p=2, dim=1)
    embedder = open_embedder(str(folder))
    ours = torch.cat([embedder.query(TEXTS[0]), embedder.embed([embedder.prepare(text) for text in TEXTS])])
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)
    # Without its recipe it is another vector, so that the comparison above can fail.
    bare = open_embedder(str(folder), instruction="").query(TEXTS[0])
    torch.testing.assert_close(bare, truth[1:2], atol=1e-5, rtol=0)
    assert (bare - truth[:1]).abs().max() > 0.01


@torch.inference_mode()
def test_the_mean_of_a_text_is_that_of_its_tokens(qwen, monkeypatch):
    folder, model, tokenizer = qwen
    tokenizer.no_padding()
    monkeypatch.setattr(embed, "ROW_LENGTH", 64)  # several texts a row, and several rows
    embedder = open_embedder(str(folder), pooling="mean")
    ours = embedder.embed([embedder.prepare(text) for text in TEXTS])
    for text, vector in zip(TEXTS, ours, strict=True):
        hidden = model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
        torch.testing.assert_close(vector, F.normalize(hidden[0].mean(0), dim=0), atol=1e-5, rtol=0)


def test_the_places_of_tokens_are_those_of_a_text_of_any_length(qwen):
    folder, _, tokenizer = qwen
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    places = open_embedder(str(folder)).tokens(TEXTS[2])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(places) > 50 and places[-1][1] == len(TEXTS[2])


@torch.inference_mode()
def test_a_vlm_embeds_pictures_beside_texts(tmp_path, processor):
    torch.manual_seed(0)
    save_model(tmp_path / "model", VLM(TINY), processor)
    embedder = open_embedder(str(tmp_path / "model"))
    contents = [noise(0), "red", noise(1, size=40)]
    together = embedder.embed([embedder.prepare(content) for content in contents])
    alone = torch.cat([embedder.embed([embedder.prepare(content)]) for content in contents])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert embedder.sees and (together[0] - together[2]).abs().max() > 1e-3
    with pytest.raises(UserError, match="tokens is longer than the"):
        embedder.prepare("red " * 9000)


@torch.inference_mode()
def test_pictures_are_embedded_a_few_tiles_at_a_time(processor, monkeypatch):
    """However many tokens a row has room for, and also where a picture alone has more tiles."""
    torch.manual_seed(0)
    native = dict(tiling=TilingConfig("native", max_patches=40), projector=ProjectorConfig(scale_factor=2))
    config, seen = dataclasses.replace(TINY, **native), []
    model = VLM(config).eval()
    embedder = open_embedder("model", loaded=(model, Processor(processor.tokenizer, CHAT_TEMPLATE, config)))
    prepared = [embedder.prepare(x) for x in (noise(0), "red", noise(1), noise(2, size=9), "blue", noise(3), noise(4))]
    assert [len(document.tiles) for document in prepared] == [9, 0, 9, 9, 0, 9, 9]
    alone = torch.cat([embedder.embed([one]) for one in prepared])
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0].pixel_values)))
    for pixels, most in ((embed.ROW_PIXELS, 45), (20 * config.tile_size**2, 18), (1, 9)):
        monkeypatch.setattr(embed, "ROW_PIXELS", pixels)
        seen.clear()
        torch.testing.assert_close(embedder.embed(prepared), alone, atol=1e-5, rtol=0)
        assert sum(seen) == 45 and max(seen) == most


def make_dual(folder, processor):
    torch.manual_seed(0)
    text = TextConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = DualConfig(vision=TINY.vision, text=text, projection_size=32)
    model, dual_processor = Dual(config).eval(), DualProcessor(processor.tokenizer, config)
    save_dual(folder, model, dual_processor)
    return model, dual_processor


@torch.inference_mode()
def test_a_dual_model_embeds_both_in_the_order_given(tmp_path, processor):
    model, dual_processor = make_dual(tmp_path / "model", processor)
    embedder = open_embedder(str(tmp_path / "model"))
    contents = ["red", noise(0), "a blue square", noise(1), noise(2)]
    ours = embedder.embed([embedder.prepare(content) for content in contents])
    texts = model.embed_texts(dual_processor.encode_texts(["red", "a blue square"]))
    images = model.embed_images(dual_processor.encode_images([noise(i) for i in range(3)]))
    truth = torch.stack([texts[0], images[0], texts[1], images[1], images[2]])
    torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)
    torch.testing.assert_close(embedder.query("red"), texts[:1], atol=1e-6, rtol=0)


def test_an_index_knows_its_model(tmp_path, qwen, processor):
    folder = qwen[0]
    about = open_embedder(str(folder), pooling="mean", instruction="").about
    assert about["model"] == str(folder) and about["vector_size"] == 32
    again = embedder_of(json.loads(json.dumps(about)), "cpu")
    assert again.about == about and again.as_query("x") == "x"
    make_dual(tmp_path / "other", processor)
    with pytest.raises(UserError, match="is not the model of the index"):
        embedder_of(about, "cpu", str(tmp_path / "other"))
    assert embedder_of({"vector_size": 0}, "cpu") is None
    assert open_embedder(str(folder)).as_query("x") == f"Instruct: {INSTRUCTION}\nQuery:x"


def test_a_fingerprint_changes_with_any_step_of_training_and_with_nothing_else(processor: Processor):
    torch.manual_seed(0)
    model = VLM(TINY).eval()
    before = fingerprint(model)
    assert fingerprint(prepare(model)) == before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.logits(processor([{"role": "user", "content": "red?"}])).sum().backward()
    optimizer.step()
    assert fingerprint(model) != before
