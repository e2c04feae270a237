"""LLaVA 1.5 as transformers writes it and as it was published: equal logits; what is not as in LLaVA 1.5 is named."""

import dataclasses
import json
import re

import pytest
import torch
import transformers as hub
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import nanovlm
from nanovlm.config import ProjectorConfig
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.hub.export import check_exportable
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.sharded import places
from nanovlm.train.init import _open_vision
from tests.conftest import TINY
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

TOWER = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8, intermediate_size=40
)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SPECIAL = {"pad": "<|pad|>", "eos": "<end_of_utterance>"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image>\\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One that puts a token before every text, which LLaVA's template leaves to it."""
    tokenizer = train_tokenizer(["what is it? a cat"] * 9, 280)
    begin = SPECIAL["pad"]
    tokenizer.post_processor = TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    return tokenizer


def make(folder, tokenizer, text="Llama", **settings):
    """Write a random model, its tokenizer and its image settings as transformers does; return the model."""
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    size = {"vocab_size": tokenizer.get_vocab_size() + 5}
    torch.manual_seed(0)
    config = hub.LlavaConfig(
        vision_config=hub.CLIPVisionConfig(**TOWER),
        text_config=getattr(hub, f"{text}Config")(**TEXT, **size, **ids),
        image_token_index=tokenizer.token_to_id("<image>"),
        **settings,
    )
    model = hub.LlavaForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    theirs = hub.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **tokens)
    theirs.save_pretrained(folder)
    hub.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return model


# Beginnings of names: any of them, those of llava-hf's files, and those of transformers 5's modules.
NAMES = (
    (r"(model\.)?language_model\.(model\.)?(?!lm_head)", "language_model.model.", "model.language_model."),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head.", "lm_head."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", "model.vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector.", "model.multi_modal_projector."),
)


def rename(folder, is_published):
    """Give the tensors the names of llava-hf's files, or those of transformers 5, which may write either."""
    tensors = load_file(folder / "model.safetensors")
    for pattern, published, current in NAMES:
        begin = published if is_published else current
        tensors = {re.sub(f"^{pattern}", begin, name): x for name, x in tensors.items()}
    if is_published:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    heads = {name.partition("layers.")[0] for name in tensors if "layers." in name}
    assert heads == {NAMES[0][2 - is_published], NAMES[2][2 - is_published] + "encoder."}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("is_published", [False, True], ids=["transformers 5", "llava-hf"])
def test_logits_are_those_of_transformers(tmp_path, tokenizer, is_published, layer):
    theirs = make(tmp_path, tokenizer, "Qwen2" if layer == -1 else "Llama", vision_feature_layer=layer)
    rename(tmp_path, is_published)
    model, processor = nanovlm.load(tmp_path)
    config = model.config
    assert config.num_image_tokens == 16 and config.vision.num_hidden_layers == {-2: 2, -1: 3, 1: 1}[layer]
    image = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    document = processor.prompt(messages, [Image.fromarray(image)])
    batch = processor.batch([document])
    images = hub.AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(image), return_tensors="pt")
    pixels = normalize(batch.pixel_values, config.vision.mean, config.vision.std)
    assert (images["pixel_values"] - pixels).abs().max() < 0.05  # torch's filter and PIL's round otherwise
    ids = batch.input_ids[batch.doc_ids >= 0]
    assert (ids == config.image_token_id).sum() == 16
    read = hub.AutoTokenizer.from_pretrained(tmp_path)
    text = read.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == read(text.replace("<image>", "<image>" * 16)).input_ids
    expected = theirs(input_ids=ids[None], pixel_values=pixels).logits[0]
    found = model.logits(batch)[0, : len(ids)]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.1


@torch.no_grad()
def test_its_encoder_begins_a_run(tmp_path, tokenizer):
    """With the features that its projector sees."""
    theirs = make(tmp_path, tokenizer).model.vision_tower
    vision, fill, _ = _open_vision(str(tmp_path))
    model = VLM(dataclasses.replace(TINY, vision=vision, projector=ProjectorConfig("mlp", scale_factor=1)))
    fill({name: x for name, x in places(model).items() if name.startswith("vision.")})
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert (model.vision(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_not_as_in_it_is_named(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    original = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' is not supported"),
        ({"vision_feature_layer": [-2, 1]}, r"vision_feature_layer = \[-2, 1\] must be one of the 3 blocks"),
        ({"vision_feature_layer": -4}, "vision_feature_layer = -4 must be one of the 3 blocks"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu' is not supported"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be that of a clip_vision_model"),
        ({"text_config": "x"}, "text_config must be a JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(original | changes))
        with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
            nanovlm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(ValueError, match="cannot be exported"):
        check_exportable(nanovlm.load(tmp_path)[1])
