"""Dual models in hub layouts compute what transformers' do, from pictures and texts to probabilities, and go back."""

import dataclasses
import json

import pytest
import torch
import transformers as hub
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import nanovlm
from nanovlm.config import DualConfig
from nanovlm.data.records import to_sample
from nanovlm.errors import UserError
from nanovlm.hub.dual import load_dual, main, save_dual
from nanovlm.hub.dual_layouts import export_dual, find_layout
from nanovlm.model.vision import normalize
from tests.model.test_parity import assert_close, randomize

TEXTS = ["a red circle", "Two blue squares at the top, and 7!", "", "word " * 30]
SHARED = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
PAD = {"siglip": "</s>", "siglip2": "<pad>", "clip": "<|endoftext|>"}


def make_tokenizer(family: str) -> Tokenizer:
    """One token a character of ASCII, with the special tokens of a family."""
    begin, end = {"clip": ("<|startoftext|>", "<|endoftext|>")}.get(family, ("", "</s>"))
    special = [token for token in dict.fromkeys((PAD[family], begin, end, "<unk>")) if token]
    vocab = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC() if family == "siglip2" else normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(special)
    both = [(token, vocab[token]) for token in (begin, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A {end}".strip(), None, both)
    return tokenizer


def make_folder(family: str, folder, seed=0):
    """Write a tiny random model with its processor, as transformers does; return both."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family)
    size, last = tokenizer.get_vocab_size(), tokenizer.token_to_id(PAD["clip"] if family == "clip" else "</s>")
    text = SHARED | dict(vocab_size=size, max_position_embeddings=16, eos_token_id=last, bos_token_id=0)
    image = SHARED | dict(image_size=33, patch_size=8)
    if family == "clip":
        config = hub.CLIPConfig(text_config=text, vision_config=image | {"hidden_size": 30}, projection_dim=20)
        model, images = hub.CLIPModel(config), hub.CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=33)
    else:
        model = hub.SiglipModel(hub.SiglipConfig(text_config=text, vision_config=image))
        images = hub.SiglipImageProcessorPil(size={"height": 33, "width": 33}, resample=2 if family == "siglip2" else 3)
    randomize(model.vision_model), randomize(model.text_model)
    model.eval().save_pretrained(folder)
    names = ["input_ids"] + ["attention_mask"] * (family == "clip")  # padding is attended to, as the published ones say
    fast = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD[family],
        eos_token=tokenizer.id_to_token(last),
        model_input_names=names,
    )
    kind = hub.CLIPProcessor if family == "clip" else hub.SiglipProcessor
    processor = kind(image_processor=images, tokenizer=fast)
    processor.save_pretrained(folder)
    return model, processor


def draw(width, height):
    generator = torch.Generator().manual_seed(width)
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator).byte().numpy())


IMAGES = [draw(50, 40), draw(33, 33), draw(20, 61)]


def ask(processor, family):
    padding = "longest" if family == "clip" else "max_length"
    return processor(text=TEXTS, images=IMAGES, padding=padding, truncation=True, max_length=16, return_tensors="pt")


@torch.inference_mode()
@pytest.mark.parametrize("family", PAD)
def test_pictures_and_texts_give_what_transformers_gives(family, tmp_path):
    theirs, their_processor = make_folder(family, tmp_path)
    ours, processor = load_dual(tmp_path)
    inputs = ask(their_processor, family)
    expected = theirs(**inputs)
    pixels = processor.encode_images(IMAGES)
    embeds, texts = ours.embed_images(pixels), ours.embed_texts(processor.encode_texts(TEXTS))
    assert_close(ours.embed_images(inputs["pixel_values"]), expected.image_embeds)
    assert_close(embeds, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    assert_close(ours.logits(embeds, texts), expected.logits_per_image)
    scores = torch.sigmoid if family != "clip" else lambda logits: logits.softmax(1)
    assert_close(scores(ours.logits(embeds, texts)), scores(expected.logits_per_image))
    assert expected.text_embeds.std(0).mean() > 0.01 and expected.image_embeds.std(0).mean() > 0.01
    difference = pixels_of(ours, pixels) - inputs["pixel_values"]
    assert difference.abs().max() < 1e-5


def pixels_of(model, pixels):
    return normalize(pixels, model.config.vision.mean, model.config.vision.std)


@torch.inference_mode()
@pytest.mark.parametrize("family", PAD)
def test_what_is_written_is_what_was_read(family, tmp_path):
    """transformers reads what we write as what it wrote itself: tensors, embeddings, tokens and pixels."""
    theirs, _ = make_folder(family, tmp_path / "theirs")
    ours, processor = load_dual(tmp_path / "theirs")
    export_dual(ours, processor, tmp_path / "ours")
    again, loading = hub.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()) and type(again) is type(theirs)
    tensors, expected = again.state_dict(), theirs.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    inputs = ask(hub.AutoProcessor.from_pretrained(tmp_path / "ours"), family)
    outputs = again.eval()(**inputs)
    batch, pixels = processor.encode_texts(TEXTS), processor.encode_images(IMAGES)
    assert_close(ours.logits(ours.embed_images(pixels), ours.embed_texts(batch)), outputs.logits_per_image)
    reloaded, reread = load_dual(tmp_path / "ours")
    assert reloaded.config == ours.config
    assert torch.equal(reread.encode_texts(TEXTS).input_ids, batch.input_ids)
    with pytest.raises(UserError, match="is not empty"):
        export_dual(ours, processor, tmp_path / "ours")


@torch.inference_mode()
def test_a_model_of_our_own_goes_through_its_folder(tmp_path):
    make_folder("clip", tmp_path / "theirs")
    model, processor = load_dual(tmp_path / "theirs")
    save_dual(tmp_path / "own", model, processor)
    own, own_processor = load_dual(tmp_path / "own")
    assert own.config == model.config
    assert all(torch.equal(x, y) for x, y in zip(own.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(own_processor.encode_texts(TEXTS).input_ids, processor.encode_texts(TEXTS).input_ids)
    main([str(tmp_path / "own"), str(tmp_path / "hub")])
    assert hub.AutoConfig.from_pretrained(tmp_path / "hub").model_type == "clip"
    half, _ = load_dual(tmp_path / "own", dtype=torch.bfloat16)
    assert half.logit_scale.dtype == torch.bfloat16


def test_what_no_layout_has_is_named():
    config = DualConfig(image_pooling="mean")
    with pytest.raises(UserError, match=r"siglip has dual.text.is_padded: True against False; clip has dual.vision.pa"):
        find_layout(config)
    padded = dataclasses.replace(DualConfig(), text=dataclasses.replace(config.text, is_padded=True))
    assert find_layout(padded) == "siglip"
    with pytest.raises(UserError, match=r"siglip has dual\.initial_bias: a number against None"):
        find_layout(dataclasses.replace(padded, initial_bias=None))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"model_type": "align"}, "model_type = 'align' is unknown; there are siglip, clip"),
        ("config.json", {"text_config": 3}, "text_config and vision_config must be JSON objects"),
        ("config.json", {"text_config": {"hidden_act": "relu"}}, "hidden_act = 'relu' is unknown; there are gelu"),
        (
            "config.json",
            {"text_config": SHARED | {"vocab_size": 9}},
            "the tokenizer has tokens up to id ",
        ),
        (
            "config.json",
            {"vision_config": SHARED | {"vision_use_head": False}},
            "vision_use_head = False is not",
        ),
        ("processor_config.json", {"image_processor": {"resample": 1}}, "resample = 1 is not supported"),
        ("processor_config.json", {"image_processor": {"size": {"height": 9, "width": 9}}}, "size = .* must be"),
        ("processor_config.json", {"image_processor": {"do_resize": False}}, "do_resize = False is not supported"),
        ("tokenizer_config.json", {"padding_side": "middle"}, "padding_side = 'middle' and pad_token"),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(tmp_path, file, change, sentence):
    make_folder("siglip", tmp_path)
    data = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(data | change))
    with pytest.raises(UserError, match=sentence) as error:
        load_dual(tmp_path)
    assert file in str(error.value) or "tokenizer" in sentence


def test_texts_are_cut_and_stay_texts(tmp_path):
    """A text that spells an end token has no end in its middle; a long one is cut before its end token."""
    make_folder("clip", tmp_path)
    processor = load_dual(tmp_path)[1]
    end = processor.tokenizer.token_to_id("<|endoftext|>")
    for text in ("an <|endoftext|> end", "word " * 30):
        ids = processor.text_document(text).input_ids
        assert ids.tolist().count(end) == 1 and ids[-1] == end and len(ids) <= 16


def test_a_record_becomes_its_caption_and_its_picture(tmp_path):
    make_folder("siglip", tmp_path)
    processor = load_dual(tmp_path)[1]
    record = {"images": [IMAGES[0]], "texts": [{"user": "what is it?", "assistant": "a red circle"}]}
    document = processor.document(to_sample(record))
    assert torch.equal(document.input_ids, processor.text_document("a red circle").input_ids) and len(document) == 16
    assert torch.equal(document.tiles, processor.encode_images(IMAGES[:1]))
    with pytest.raises(UserError, match="the record has 2 pictures"):
        processor.document(to_sample(record | {"images": IMAGES[:2]}))


def test_a_model_of_the_other_kind_is_named_as_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vision": {}, "decoder": {}, "bos_token_id": 1}))
    with pytest.raises(UserError, match="is a vision-language model: a dual encoder, of a contrastive run, is needed"):
        load_dual(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vision": {}, "text": {}, "image_pooling": "mean"}))
    with pytest.raises(UserError, match="is a dual encoder: a vision-language model, which answers, is needed"):
        nanovlm.load(tmp_path)
