"""PaliGemma as transformers writes it and as it was published: tokens, pixels, logits and greedy answers are equal."""

import json
import re

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import nanovlm
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.data.types import Sample
from nanovlm.hub.export import check_exportable
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.hub.test_gemma3 import NAMES, TOWER
from tests.hub.test_layouts import edit
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=512,
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<image>"]
NUM_ADDED = 1024 + 128  # tokens of places and masks, which their processor adds


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["what is it? a cat", "answer en\n\n"] * 9, 280)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make(folder, tokenizer):
    """Write a random model, its tokenizer and its image settings as transformers does; return model and processor."""
    pad, eos, bos, image = (tokenizer.token_to_id(token) for token in SPECIAL)
    ids = {"pad_token_id": pad, "eos_token_id": eos, "bos_token_id": bos}
    torch.manual_seed(0)
    config = hub.PaliGemmaConfig(
        vision_config=hub.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hub.GemmaConfig(**TEXT | ids, vocab_size=tokenizer.get_vocab_size() + NUM_ADDED),
        image_token_index=image,
        projection_dim=TEXT["hidden_size"],
        **ids,
    )
    model = hub.PaliGemmaForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    theirs = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
    processor = hub.PaliGemmaProcessor(images, theirs)
    processor.save_pretrained(folder)
    return model, processor


@torch.inference_mode()
def test_pictures_are_answered_as_by_transformers(tmp_path, tokenizer):
    """Where each token of a prompt sees all of it, the line break at its end, too."""
    theirs, processor = make(tmp_path, tokenizer)
    ours, own = nanovlm.load(tmp_path)
    documents, told = [], []
    for shown in (1, 3):
        images = [noise(i, 64).resize((40 + 9 * i, 60)) for i in range(shown)]
        parts = [{"type": "image"} for _ in images]
        if shown == 3:  # bos comes behind the last picture
            parts.insert(1, {"type": "text", "text": "a cat"})
        text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts) + "what is it?"
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        del inputs["labels"]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]
        documents.append(document := own.prompt(messages, images))
        batch = own.batch([document])
        assert batch.input_ids.tolist() == inputs["input_ids"].tolist() and not inputs["token_type_ids"].any()
        assert (normalize(batch.pixel_values) - inputs["pixel_values"]).abs().max() <= 1e-6
        logits = theirs(**inputs).logits
        assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert logits.std() > 0.1
        never = [ours.config.pad_token_id, ours.config.image_token_id]
        found = theirs.generate(**inputs, do_sample=False, max_new_tokens=32, suppress_tokens=never)
        found = found[0, inputs["input_ids"].shape[1] :].tolist()
        end = ours.config.eos_token_id
        told.append(found[: found.index(end)] if end in found else found)
    assert nanovlm.generate(ours, own.batch(documents), max_new_tokens=32) == told
    # A picture that no message places is before the question, as there.
    assert own.prompt([{"role": "user", "content": "what is it?"}], images[:1]).input_ids.equal(documents[0].input_ids)


@torch.inference_mode()
def test_an_answer_is_trained_as_transformers_does(tmp_path, tokenizer):
    theirs, processor = make(tmp_path, tokenizer)
    ours, own = nanovlm.load(tmp_path)
    image = noise(0, 32)
    inputs = processor(text=["<image>what is it?"], images=[[image]], suffix=["a cat"], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    sample = Sample([image], [*messages, {"role": "assistant", "content": "a cat"}])
    batch = own.batch([document := own.document(sample)])
    assert document.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert document.labels.tolist() == [*inputs["labels"][0, 1:].tolist(), -100]
    logits = theirs(**inputs).logits
    assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()


@torch.inference_mode()
def test_published_names_and_configs_are_read(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    first = nanovlm.load(tmp_path)[0]
    tensors = load_file(tmp_path / "model.safetensors")
    for pattern, published in NAMES:
        tensors = {re.sub(f"^{pattern}", published, name): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    kept = (*TEXT, "vocab_size", "model_type")

    def change(data):
        data["text_config"] = {name: data["text_config"][name] for name in kept} | {"num_image_tokens": 16}
        data.pop("tie_word_embeddings", None)

    edit(tmp_path / "config.json", change)
    second = nanovlm.load(tmp_path)[0]
    assert second.config == first.config
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_each_rank_reads_its_rows(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    assert_ranks_fill_their_rows(find_model(tmp_path))


def test_what_we_do_not_compute_is_refused(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="cannot be exported"):
        check_exportable(nanovlm.load(tmp_path)[1])
    original = json.loads((tmp_path / "config.json").read_text())
    for part, changes, message in (
        (None, {"text_config": "x"}, "text_config and vision_config must be JSON objects"),
        ("vision_config", {"model_type": "clip_vision_model"}, "model_type = 'clip_vision_model' is not supported"),
        ("text_config", {"model_type": "gemma2"}, "model_type = 'gemma2' is not supported; it must be 'gemma'"),
        ("text_config", {"use_bidirectional_attention": False}, "use_bidirectional_attention = False is not supported"),
    ):
        data = json.loads(json.dumps(original))
        (data[part] if part else data).update(changes)
        (tmp_path / "config.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(original))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="has a chat template, which PaliGemma has not"):
        find_model(tmp_path)
