"""Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE as transformers writes them: the same tokens, pixels, logits and answers."""

import json

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import nanovlm
from nanovlm.hub.read import find_model
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.data.chat_templates import FAMILIES, make_tokenizer
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = FAMILIES["Qwen2-VL"]
TEXT = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
VISION = dict(depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=8, out_hidden_size=48)
# Squares of 2 x 2 image tokens, some of them cut at the edges; none; two levels of DeepStack.
KINDS = {
    "qwen2_5_vl": ("Qwen2_5_VL", dict(window_size=32, fullatt_block_indexes=[1]), dict(mrope_section=[1, 2, 3])),
    "qwen3_vl": (
        "Qwen3VL",
        dict(deepstack_visual_indexes=[0, 2], num_position_embeddings=25),
        dict(mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
}
KINDS["qwen3_vl_moe"] = ("Qwen3VLMoe", *KINDS["qwen3_vl"][1:])
MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1])
SIZES = [(40, 70), (90, 30), (16, 16), (33, 47)]


def make_folder(folder, kind, tied=False):
    """A tiny model with tokenizer, template and image settings, as published."""
    name, vision, rope = KINDS[kind]
    tokenizer = make_tokenizer(FAMILY)
    special = {part: tokenizer.token_to_id(token) for part, token in (("eos", "<|im_end|>"), ("pad", "<|endoftext|>"))}
    text = TEXT | {f"{part}_token_id": i for part, i in special.items()} | {"vocab_size": tokenizer.get_vocab_size()}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | rope, "bos_token_id": None}
    text |= {"head_dim": 16} if kind != "qwen2_5_vl" else {}
    text |= MOE if kind == "qwen3_vl_moe" else {}
    torch.manual_seed(0)
    config = getattr(hub, f"{name}Config")(
        text_config=text,
        vision_config=VISION | vision,
        image_token_id=tokenizer.token_to_id(FAMILY.image),
        tie_word_embeddings=tied,
    )
    model = getattr(hub, f"{name}ForConditionalGeneration")(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    fast = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=FAMILY.template
    )
    fast.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 4096})
    images.save_pretrained(folder)
    return model, fast, images


def ask(theirs, tokenizer, images, messages, shown):
    """Tokens and pixels as their processor makes them, without its videos, for which torchvision would be needed."""
    inputs = dict(images(shown, return_tensors="pt")) if shown else {}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for _, rows, columns in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist():
        text = text.replace(FAMILY.image, "<seen>" * (rows * columns // 4), 1)
    ids = tokenizer(text.replace("<seen>", FAMILY.image), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return {"input_ids": ids, "mm_token_type_ids": (ids == theirs.config.image_token_id).int()} | inputs


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "tied"), [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("qwen3_vl_moe", False)]
)
def test_answers_are_those_of_transformers(kind, tied, tmp_path):
    theirs, tokenizer, images = make_folder(tmp_path, kind, tied)
    ours, processor = nanovlm.load(tmp_path)
    documents, told = [], []
    for shown in ([], SIZES[:1], SIZES[1:2], SIZES):
        pictures = [noise(i, 64).resize(size) for i, size in enumerate(shown)]
        parts = [{"type": "image", "image": picture} for picture in pictures]
        parts.insert(len(parts) // 2, {"type": "text", "text": "what is this?"})
        messages = [{"role": "user", "content": parts}]
        inputs = ask(theirs, tokenizer, images, messages, pictures)
        documents.append(document := processor.prompt(messages, pictures))
        batch = processor.batch([document])
        assert batch.input_ids.tolist() == inputs["input_ids"].tolist()
        if shown:
            pixels = normalize(batch.pixel_values, ours.config.vision.mean, ours.config.vision.std)
            patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)[..., None, :, :]
            patches = patches.expand(-1, -1, -1, -1, 2, -1, -1).reshape(inputs["pixel_values"].shape)
            assert (patches - inputs["pixel_values"]).abs().max() <= 1e-6
        logits = theirs(**inputs).logits
        assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
        never = [ours.config.pad_token_id, ours.config.image_token_id]
        found = theirs.generate(**inputs, do_sample=False, max_new_tokens=32, suppress_tokens=never)
        found = found[0, inputs["input_ids"].shape[1] :].tolist()
        end = ours.config.eos_token_id
        told.append(found[: found.index(end)] if end in found else found)
    # All at once, each beside others with other shifts of their positions.
    assert nanovlm.generate(ours, processor.batch(documents), max_new_tokens=32) == told


def test_published_names_and_older_configs_are_read(tmp_path):
    """Qwen2.5-VL is published with the decoder's fields beside those of the whole, and pixels under older names."""
    make_folder(tmp_path, "qwen2_5_vl")
    config = find_model(tmp_path).config
    data = json.loads((tmp_path / "config.json").read_text())
    text = data.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(text | data))
    images = {"min_pixels": 1024, "max_pixels": 4096, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    assert find_model(tmp_path).config == config
    assert (config.tiling.min_pixels, config.tiling.max_pixels) == (1024, 4096)


def test_experts_are_read_as_they_are_published(tmp_path):
    """[E, inputs, outputs], where transformers 5 saves [E, outputs, inputs]; it reads both."""
    theirs, *_ = make_folder(tmp_path, "qwen3_vl_moe")
    first = nanovlm.load(tmp_path)[0].state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 48)
    tensors = {name: x.mT.contiguous() if ".experts." in name else x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    second = nanovlm.load(tmp_path)[0].state_dict()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    again = type(theirs).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in theirs.state_dict().items())


def test_each_rank_reads_its_rows(tmp_path):
    make_folder(tmp_path, "qwen3_vl_moe")
    assert_ranks_fill_their_rows(find_model(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mrope_section": None}, r"mrope_section = None must be a list"),
        ({"mrope_section": [1, 2]}, r"decoder.rope_sections = \(1, 2\) must be three numbers"),
        ({"mrope_interleaved": False}, r"mrope_interleaved = False is not supported; it must be True"),
        ({"deepstack_visual_indexes": [0, 1, 2]}, r"projector.deepstack_layers = \(0, 1, 2\) must be indices"),
        ({"num_position_embeddings": 24}, r"num_position_embeddings = 24 must be the square"),
        ({"out_hidden_size": 32}, r"out_hidden_size = 32 must be the hidden_size = 48"),
        ({"temporal_patch_size": 1}, r"temporal_patch_size = 1 is not supported; it must be 2"),
        ({"merge_size": 3}, r"merge_size = 3 is not supported; it must be 2"),
        ({"size": {"longest_edge": 100}}, r"tiling.max_pixels = 100 must be at least"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message, tmp_path):
    make_folder(tmp_path, "qwen3_vl")
    ((name, value),) = change.items()
    for file in ("config.json", "preprocessor_config.json"):
        data = json.loads((tmp_path / file).read_text())
        rope = data.get("text_config", {}).get("rope_parameters", {})
        for part in (data, rope, *(x for x in data.values() if isinstance(x, dict))):
            part |= {name: value} if name in part else {}
        (tmp_path / file).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        find_model(tmp_path)
