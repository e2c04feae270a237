"""LLaVA-OneVision as transformers writes it: tokens, pixels, logits and greedy answers are the same."""

import json
import random

import pytest
import torch
import transformers as hub
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

import nanovlm
from nanovlm.data.images import find_grids
from nanovlm.data.places import count_places
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.hub.test_llava import SPECIAL, TEMPLATE, TEXT
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

SIDE, MOST = 32, 4
TOWER = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=8, intermediate_size=40
)
GRIDS = [[SIDE * rows, SIDE * columns] for rows in range(1, MOST + 1) for columns in range(1, MOST + 1)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it? a cat"] * 9, 280)


def make_folder(folder, tokenizer):
    """A tiny model, of which pictures of more than 3 tiles are shrunk."""
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    torch.manual_seed(0)
    config = hub.LlavaOnevisionConfig(
        vision_config=hub.SiglipVisionConfig(**TOWER),
        text_config=hub.Qwen2Config(**TEXT, vocab_size=tokenizer.get_vocab_size() + 5, **ids),
        image_token_id=tokenizer.token_to_id("<image>"),
        image_grid_pinpoints=GRIDS,
        vision_aspect_ratio="anyres_max_3",
    )
    model = hub.LlavaOnevisionForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    fast = hub.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **tokens)
    fast.save_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRIDS, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images.save_pretrained(folder)
    return model, fast, images


class Counter:
    """What their processor counts image tokens with; it cannot be built without torchvision, for videos."""

    num_image_tokens = (SIDE // 8) ** 2
    vision_aspect_ratio, vision_feature_select_strategy, image_token = "anyres_max_3", "full", "<image>"
    replace = LlavaOnevisionProcessor.replace_image_token
    _get_number_of_features = LlavaOnevisionProcessor._get_number_of_features
    _get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features

    def __init__(self, images):
        self.image_processor = images


@torch.inference_mode()
def test_answers_are_those_of_transformers(tokenizer, tmp_path):
    """One picture of a tile, of a grid with a border at either side, one that is shrunk, two pictures, and none."""
    theirs, fast, images = make_folder(tmp_path, tokenizer)
    ours, processor = nanovlm.load(tmp_path)
    documents, told = [], []
    for sizes in ([(20, 30)], [(64, 20)], [(50, 64)], [(90, 128)], [(33, 40), (64, 40)], []):
        pictures = [noise(i, 64).resize(size) for i, size in enumerate(sizes)]
        messages = [{"role": "user", "content": [*({"type": "image"} for _ in sizes), {"type": "text", "text": "is?"}]}]
        inputs = dict(images(pictures, return_tensors="pt")) if sizes else {}
        text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for i in range(len(sizes)):
            text = text.replace("<image>", Counter(images).replace(inputs, i).replace("<image>", "<seen>"), 1)
        ids = fast(text.replace("<seen>", "<image>"), return_tensors="pt", add_special_tokens=False)["input_ids"]
        documents.append(document := processor.prompt(messages, pictures))
        batch = processor.batch([document])
        assert batch.input_ids.tolist() == ids.tolist()
        if len(sizes) == 1:
            pixels = inputs["pixel_values"][0]
            assert (normalize(batch.pixel_values) - pixels).abs().max() <= 1e-6
        logits = theirs(input_ids=ids, **inputs).logits
        assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
        never = [ours.config.pad_token_id, ours.config.image_token_id]
        options = dict(do_sample=False, max_new_tokens=32, suppress_tokens=never)
        found = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **options)
        found = found[0, ids.shape[1] :].tolist()
        end = ours.config.eos_token_id
        told.append(found[: found.index(end)] if end in found else found)
    assert nanovlm.generate(ours, processor.batch(documents), max_new_tokens=32) == told


def test_as_many_tokens_as_transformers_counts_for_any_size(tokenizer, tmp_path):
    images = make_folder(tmp_path, tokenizer)[2]
    config, counter, rng = find_model(tmp_path).config, Counter(images), random.Random(0)
    for _ in range(60):
        picture = noise(0, 8).resize((rng.randint(1, 300), rng.randint(1, 300)))
        expected = counter._get_number_of_features(picture.height, picture.width, SIDE, SIDE)
        assert count_places(config, find_grids([picture], config)) == [expected], picture.size


def test_each_rank_reads_its_rows(tokenizer, tmp_path):
    make_folder(tmp_path, tokenizer)
    assert_ranks_fill_their_rows(find_model(tmp_path))


def test_gradients_reach_the_newline_and_a_batch_without_pictures_runs_it(tokenizer, tmp_path):
    make_folder(tmp_path, tokenizer)
    model, processor = nanovlm.load(tmp_path)
    message = [{"role": "user", "content": "what?"}]
    model(processor(message, [noise(0, 64).resize((50, 64))])).square().sum().backward()
    assert model.projector.newline.grad.abs().sum() > 0
    model.always_sees = True
    model.zero_grad()
    model(processor(message)).sum().backward()
    assert not model.projector.newline.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, r"vision_aspect_ratio = 'pad' is not supported"),
        ({"image_grid_pinpoints": GRIDS[1:]}, r"image_grid_pinpoints = .* must be all grids of tiles of 32 pixels"),
        ({"vision_feature_select_strategy": "default"}, r"vision_feature_select_strategy = 'default' is not supported"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer = \[-2, -1\] must be one of the 2 blocks"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message, tokenizer, tmp_path):
    make_folder(tmp_path, tokenizer)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        find_model(tmp_path)
