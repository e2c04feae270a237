"""InternVL3 as transformers writes it: tokens, pixels, logits and greedy answers are the same."""

import dataclasses
import json
import random

import pytest
import torch
import transformers as hub
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import nanovlm
from nanovlm.data.images import plan_tiles
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.data.chat_templates import FAMILIES, QWEN2_VL, make_tokenizer
from tests.hub.test_llava import TEXT
from tests.hub.test_published import GPTQ
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

SIDE, IMAGE = 32, "<IMG_CONTEXT>"
TOWER = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=[SIDE] * 2, patch_size=[8] * 2,
    intermediate_size=40, attention_bias=True,
)  # fmt: skip
# Its own, as far as pictures go.
TEMPLATE = QWEN2_VL.replace("<|vision_start|><|image_pad|><|vision_end|>", f"{IMAGE}\n")


def make_folder(folder):
    assert IMAGE in TEMPLATE
    tokenizer = make_tokenizer(FAMILIES["Qwen2-VL"], ("<img>", "</img>", IMAGE))
    ids = {"eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": tokenizer.token_to_id("<|endoftext|>")}
    torch.manual_seed(0)
    config = hub.InternVLConfig(
        vision_config=TOWER,
        text_config=hub.Qwen2Config(**TEXT, vocab_size=tokenizer.get_vocab_size(), **ids),
        image_token_id=tokenizer.token_to_id(IMAGE),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = hub.InternVLForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    fast = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=6, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )
    images.save_pretrained(folder)
    return model, fast, images


@torch.inference_mode()
def test_answers_are_those_of_transformers(tmp_path):
    theirs, fast, images = make_folder(tmp_path)
    ours, processor = nanovlm.load(tmp_path)
    documents, told = [], []
    for sizes in ([(20, 30)], [(130, 40)], [(90, 128), (64, 64)], []):
        pictures = [noise(i, 64).resize(size) for i, size in enumerate(sizes)]
        messages = [{"role": "user", "content": [*({"type": "image"} for _ in sizes), {"type": "text", "text": "is?"}]}]
        inputs = dict(images(pictures, crop_to_patches=True, return_tensors="pt")) if sizes else {}
        text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for number in inputs.pop("num_patches", []):
            text = text.replace(IMAGE, f"<img>{'<seen>' * (4 * number)}</img>", 1)
        # With what the tokenizer puts before every text, as their processor calls it.
        ids = fast(text.replace("<seen>", IMAGE), return_tensors="pt")["input_ids"]
        documents.append(document := processor.prompt(messages, pictures))
        batch = processor.batch([document])
        assert batch.input_ids.tolist() == ids.tolist()
        if sizes:
            pixels = normalize(batch.pixel_values, ours.config.vision.mean, ours.config.vision.std)
            assert (pixels - inputs["pixel_values"]).abs().max() <= 1e-6
        logits = theirs(input_ids=ids, **inputs).logits
        assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
        never = [ours.config.pad_token_id, ours.config.image_token_id]
        options = dict(do_sample=False, max_new_tokens=32, suppress_tokens=never)
        found = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **options)
        found = found[0, ids.shape[1] :].tolist()
        end = ours.config.eos_token_id
        told.append(found[: found.index(end)] if end in found else found)
    assert nanovlm.generate(ours, processor.batch(documents), max_new_tokens=32) == told


def test_as_many_tiles_as_transformers_makes_of_any_size(tmp_path):
    images = make_folder(tmp_path)[2]
    config, rng = find_model(tmp_path).config, random.Random(0)
    for _ in range(100):
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        expected = images.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        assert plan_tiles(width, height, config).num_tiles == expected, (width, height)


def test_each_rank_reads_its_rows(tmp_path):
    make_folder(tmp_path)
    assert_ranks_fill_their_rows(find_model(tmp_path))


def test_published_configs_say_it_in_the_part_of_the_language_model(tmp_path):
    """Whether the head is tied; and dynamic positions, which are plain ones as far as the model reads."""
    make_folder(tmp_path)
    path, expected = tmp_path / "config.json", find_model(tmp_path).config
    data = json.loads(path.read_text())
    del data["tie_word_embeddings"]
    theta = data["text_config"].pop("rope_parameters")["rope_theta"]
    dynamic = {"rope_theta": theta, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"}}
    for tied, is_tied in (({"tie_word_embeddings": False}, False), ({"tie_word_embeddings": True}, True), ({}, True)):
        data["text_config"].pop("tie_word_embeddings", None)
        path.write_text(json.dumps(data | {"text_config": data["text_config"] | dynamic | tied}))
        found = find_model(tmp_path).config
        decoder = dataclasses.replace(expected.decoder, tie_word_embeddings=is_tied)
        assert found == dataclasses.replace(expected, decoder=decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qk_norm": True}, r"use_qk_norm = True is not supported"),
        ({"attention_bias": False}, r"attention_bias = False is not supported"),
        (
            {"quantization_config": GPTQ},
            r"config.json: quantization_config is not read of model_type = 'internvl', only",
        ),
        ({"image_size": [32, 64]}, r"image_size = \[32, 64\] is not supported; both sides must be equal"),
        ({"image_seq_length": 16}, r"image_seq_length = 16, but a tile has 4 tokens"),
        ({"downsample_ratio": "half"}, r"downsample_ratio = 'half' must be a number above 0"),
        ({"downsample_ratio": 0.3}, r"projector.scale_factor = 3 must divide"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message, tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data |= {name: value for name, value in change.items() if name == "quantization_config"}
    for part in (data, data["vision_config"]):
        part |= {name: value for name, value in change.items() if name in part}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        find_model(tmp_path)
