"""Checkpoints as transformers writes them and as the hub has them load into our modules, equal; mistakes are named."""

import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors

import nanovlm
from nanovlm.config import TilingConfig
from nanovlm.data.images import make_tiles, marker_tokens
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document
from nanovlm.hub import configs, export, families, weights
from nanovlm.model.build import empty_model
from nanovlm.model.decoder import rope_table
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.data.chat_templates import FAMILIES, SMOLVLM, make_tokenizer
from tests.model.test_parity import randomize

hub.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent.parent
V, PAD, BOS, EOS = 131, 0, 1, 2
TEXT = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
)
DECODERS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
}
MOE = dict(num_experts_per_tok=2, num_local_experts=8, num_experts=8, moe_intermediate_size=32)
VLMS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


# Models this small take ten times as long when two threads share a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- models of transformers, with random weights ----


def make_text(family, **options):
    moe = {"mixtral": ("num_experts_per_tok", "num_local_experts"), "qwen3_moe": MOE, "olmoe": MOE}.get(family, ())
    return getattr(hub, DECODERS[family] + "Config")(**TEXT | {field: MOE[field] for field in moe} | options)


def make_model(family, text="llama", vision=None, scale_factor=2, tied=False, seed=0, **options):
    """A random model in evaluation mode; `options` are fields of the text config."""
    torch.manual_seed(seed)
    if family in DECODERS:
        config = make_text(family, tie_word_embeddings=tied, **options)
        model = getattr(hub, DECODERS[family] + "ForCausalLM")(config)
    else:
        config = getattr(hub, VLMS[family] + "Config")(
            text_config=make_text(text, tie_word_embeddings=tied, **options).to_dict(),
            vision_config=VISION | (vision or {}),
            scale_factor=scale_factor,
            image_token_id=V - 1,
            tie_word_embeddings=tied,
        )
        model = getattr(hub, VLMS[family] + "ForConditionalGeneration")(config)
    randomize(model, 1.0)
    return model.eval()


def load(model, folder, dtype=None) -> VLM:
    """Save a model of transformers and load it into our modules."""
    model.save_pretrained(folder)
    config = configs.read_config(folder)
    stored_dtype, fill = weights.open_weights(folder, config)
    model = empty_model(config, "cpu", dtype or stored_dtype)
    fill(model.state_dict())
    return model.eval()


def make_prompts(config, lengths=(150, 23), images=(2, 1)):
    """Random prompts of different lengths, as a batch of ours and as inputs of transformers one by one."""
    documents, inputs = [], []
    for length, num_images in zip(lengths, images, strict=True):
        ids = torch.randint(3, config.decoder.vocab_size - 1, (length,))
        pixel_values = torch.empty(0, 3, 0, 0)
        if config.vision is not None:
            per_tile, size = config.num_image_tokens, config.vision.image_size
            for i in range(num_images):
                ids[1 + i * (per_tile + 2) :][:per_tile] = config.image_token_id
            pixel_values = torch.randn(num_images, 3, size, size)
        zeros = torch.zeros(length, dtype=torch.int32)
        documents.append(Document(ids, torch.full_like(ids, -100), zeros, pixel_values))
        inputs.append({"input_ids": ids[None]} | ({"pixel_values": pixel_values[None]} if len(pixel_values) else {}))
    rows = [make_row([document], max(lengths), config.pad_token_id) for document in documents]
    pixel_values = torch.cat([document.tiles for document in documents])
    return dataclasses.replace(collate(rows), pixel_values=pixel_values), inputs


@torch.inference_mode()
def assert_same(theirs, ours, generates=True):
    """Equal logits and equal greedy answers of 32 tokens, in a batch of ours and one by one there.

    Without `generates` their answer is read off their logits over the prompt and our answer, which takes one forward
    pass and not 32: the likeliest token must be ours at every place.
    """
    batch, inputs = make_prompts(ours.config)
    logits = ours.logits(batch)
    answers = nanovlm.generate(ours, batch, max_new_tokens=32)
    never = [PAD] if ours.config.vision is None else [PAD, ours.config.image_token_id]
    for row, answer, prompt in zip(logits, answers, inputs, strict=True):
        length = prompt["input_ids"].shape[1]
        answer = [*answer, EOS][:32]
        ids = torch.cat((prompt["input_ids"], torch.tensor([answer])), dim=1)
        expected = theirs(**prompt | {"input_ids": ids}).logits[0]
        assert (row[:length] - expected[:length]).abs().max() <= 1e-5 * expected.abs().max()
        told = expected[length - 1 : -1].clone()
        told[:, never] = -torch.inf
        assert answer == told.argmax(-1).tolist()
        if generates:
            mask = torch.ones_like(prompt["input_ids"])
            told = theirs.generate(
                **prompt, attention_mask=mask, do_sample=False, max_new_tokens=32, suppress_tokens=never
            )
            assert answer == told[0, length:].tolist()


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
MODELS = {
    **{family: {"family": family} for family in DECODERS},
    "llama no groups": {"family": "llama", "num_key_value_heads": 4},
    "llama groups of 3": {"family": "llama", "num_attention_heads": 6, "num_key_value_heads": 2},
    "llama groups of 4": {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 1},
    "llama groups of 8": {"family": "llama", "num_attention_heads": 8, "num_key_value_heads": 1},
    "llama wide heads": {"family": "llama", "head_dim": 32},
    "llama narrow heads": {"family": "llama", "head_dim": 6},
    "llama tied": {"family": "llama", "tied": True},
    "llama one layer": {"family": "llama", "num_hidden_layers": 1},
    "llama odd vocabulary": {"family": "llama", "vocab_size": 97, "tied": True},
    "llama biases": {"family": "llama", "attention_bias": True},
    "llama eps": {"family": "llama", "rms_norm_eps": 0.3},
    "llama linear": {"family": "llama", "rope_parameters": LINEAR},
    "llama llama3": {"family": "llama", "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128}},
    "llama yarn": {"family": "llama", "rope_parameters": YARN},
    "llama yarn 64": {"family": "llama", "rope_parameters": YARN | {"original_max_position_embeddings": 64}},
    "llama yarn betas": {
        "family": "llama",
        "rope_parameters": YARN
        | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "original_max_position_embeddings": 128},
    },
    "llama dynamic": {"family": "llama", "rope_parameters": LINEAR | {"rope_type": "dynamic"}},
    "mistral without window": {"family": "mistral", "sliding_window": None, "head_dim": 20, "tied": True},
    "mistral, a window of all": {"family": "mistral", "sliding_window": 512},
    "smollm3 listed": {"family": "smollm3", "no_rope_layers": [0, 1, 0]},
    "smollm3 interval": {"family": "smollm3", "no_rope_layer_interval": 2, "num_hidden_layers": 5, "tied": True},
    "smollm3 biases": {"family": "smollm3", "attention_bias": True},
    "qwen2 tied": {"family": "qwen2", "tied": True, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2 yarn": {"family": "qwen2", "rope_parameters": YARN | {"original_max_position_embeddings": 64}},
    "qwen3 heads": {"family": "qwen3", "head_dim": 20, "tied": True},
    "qwen3 biases": {"family": "qwen3", "attention_bias": True},
    "mixtral of 3": {"family": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 3, "tied": True},
    "qwen3_moe, every second layer": {"family": "qwen3_moe", "decoder_sparse_step": 2, "num_hidden_layers": 5},
    "qwen3_moe, a dense first layer": {"family": "qwen3_moe", "mlp_only_layers": [0], "tied": True},
    "qwen3_moe normalised": {"family": "qwen3_moe", "norm_topk_prob": True, "head_dim": 20},
    "olmoe normalised": {"family": "olmoe", "norm_topk_prob": True, "num_key_value_heads": 4},
    **{f"{vlm} of {text}": {"family": vlm, "text": text} for vlm in VLMS for text in DECODERS},
    "idefics3 tied": {"family": "idefics3", "tied": True},
    "idefics3 shuffle 3": {"family": "idefics3", "vision": {"image_size": 48}, "scale_factor": 3},
    "idefics3 shuffle 4": {"family": "idefics3", "vision": {"layer_norm_eps": 0.1}, "scale_factor": 4},
    "idefics3 no shuffle": {
        "family": "idefics3",
        "vision": {"image_size": 24, "num_hidden_layers": 1},
        "scale_factor": 1,
    },
    "idefics3 border": {"family": "idefics3", "vision": {"image_size": 54, "patch_size": 8}},
    "smolvlm linear": {"family": "smolvlm", "text": "qwen2", "rope_parameters": LINEAR, "head_dim": 20},
}

GENERATE = [*DECODERS, "llama groups of 3", "llama yarn", "smollm3 listed", "idefics3 of llama", "smolvlm of smollm3"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_are_those_of_transformers(name, tmp_path):
    theirs = make_model(**MODELS[name])
    assert_same(theirs, load(theirs, tmp_path), name in GENERATE)


def test_attention_of_the_test_models_is_not_flat():
    """Else a wrong mask, position or group of heads would hardly show."""
    for family in DECODERS:
        model = make_model(family)
        model.set_attn_implementation("eager")
        weights = model(input_ids=torch.randint(3, V, (1, 150)), output_attentions=True).attentions
        assert torch.stack(weights)[..., 100:, :].amax(-1).mean() > 0.1  # flat: 0.01


@torch.inference_mode()
@pytest.mark.parametrize("family", [*DECODERS, *VLMS])
def test_bf16_differs_no_more_than_transformers_itself(family, tmp_path):
    """By a quarter at most, over five models: which of two is nearer in any one of them is luck."""
    largest, mean_square = [], []
    for seed in range(5):
        theirs = make_model(family, seed=seed)
        ours = load(theirs, tmp_path, torch.bfloat16)
        batch, inputs = make_prompts(ours.config, (150,), (2,))
        exact = torch.cat([theirs(**prompt).logits for prompt in inputs])
        theirs.to(torch.bfloat16)
        half = [{k: v if k == "input_ids" else v.bfloat16() for k, v in prompt.items()} for prompt in inputs]
        allowed = torch.cat([theirs(**prompt).logits for prompt in half]).float() - exact
        error = ours.logits(batch).float() - exact
        largest.append((error.abs().max() / allowed.abs().max()).log())
        mean_square.append((error.square().mean() / allowed.square().mean()).log() / 2)
    for ratios in (torch.stack(largest), torch.stack(mean_square)):
        assert ratios.mean().exp() <= 1.25


def test_idefics3_grids_that_are_refused_are_those_without_positions_of_their_own():
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    bad = []
    for n in range(2, 129):
        config = Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=n, patch_size=1)
        embeddings = Idefics3VisionEmbeddings(config)
        with torch.no_grad():  # what comes out is the position
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight[:, 0] = torch.arange(n * n)
            positions = embeddings(torch.zeros(1, 3, n, n), torch.ones(1, n, n, dtype=torch.bool))
        if not torch.equal(positions[0, :, 0], torch.arange(n * n, dtype=torch.float32)):
            bad.append(n)
    assert tuple(bad) == families.IDEFICS3_BAD_GRIDS


# ---- whole folders: tokenizer, template, image settings, weights ----

SIDE, LONGEST = 32, 128  # tiles of 32 x 32 pixels in images of 128


def make_vlm_folder(folder, markers="special", family="idefics3"):
    """A tiny Idefics3 as transformers saves it. Markers of places are special tokens, added ones, or plain text."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, image_size=SIDE))
    config = dataclasses.replace(config, tiling=TilingConfig(policy="idefics3", longest_edge=LONGEST))
    places = marker_tokens(config)[1:]
    tokenizer = make_tokenizer(FAMILIES["SmolVLM"], places if markers == "special" else ())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if markers == "added":
        tokenizer.add_tokens([AddedToken(place, special=False, normalized=False) for place in places])
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    text = TEXT | {"vocab_size": tokenizer.get_vocab_size() + 3, "max_position_embeddings": 2048}
    text |= {"pad_token_id": ids["pad"], "eos_token_id": ids["eos"], "bos_token_id": ids["bos"]}
    torch.manual_seed(0)
    model = getattr(hub, VLMS[family] + "ForConditionalGeneration")(
        getattr(hub, VLMS[family] + "Config")(
            text_config=hub.LlamaConfig(**text).to_dict(),
            vision_config=VISION | {"image_size": SIDE},
            scale_factor=2,
            image_token_id=tokenizer.token_to_id("<image>"),
        )
    ).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    theirs = hub.Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": LONGEST}, max_image_size={"longest_edge": SIDE}),
        hub.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in SPECIAL.items()}),
        image_seq_len=4,
        chat_template=SMOLVLM,
    )
    theirs.save_pretrained(folder)
    return model


SPECIAL = {"pad": "<|im_start|>", "bos": "<|im_start|>", "eos": "<end_of_utterance>"}


def edit(path, change):
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data))


def as_on_the_hub(folder, template="tokenizer_config.json"):
    """Lay the files out as published before transformers 5, the template in `template`."""
    processor = json.loads((folder / "processor_config.json").read_text())
    images = processor.pop("image_processor") | {"image_processor_type": "Idefics3ImageProcessor"}
    images.pop("return_row_col_info", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").unlink()
    if not (folder / template).exists():
        (folder / template).write_text("{}")
    edit(folder / template, lambda data: data.update(chat_template=SMOLVLM))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("layout", "markers"),
    [
        ("transformers 5", "special"),
        ("transformers 5", "plain"),
        ("tokenizer_config.json", "added"),
        ("chat_template.json", "plain"),
    ],
)
def test_a_whole_folder(layout, markers, tmp_path):
    """30 sizes of images: tokens, pixels, logits and greedy answers are those of transformers from the same files."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    model = make_vlm_folder(tmp_path, markers)
    if layout != "transformers 5":
        as_on_the_hub(tmp_path, layout)
    ours, processor = nanovlm.load(tmp_path)
    theirs = hub.AutoProcessor.from_pretrained(tmp_path)
    theirs.image_processor = Idefics3ImageProcessorPil.from_pretrained(tmp_path)
    template = theirs.chat_template or theirs.tokenizer.chat_template
    rng = random.Random(layout + markers)
    sizes = iter(
        [(1, 1), (1, 200), (300, 7), (32, 32), *((rng.randint(1, 200), rng.randint(1, 200)) for _ in range(26))]
    )
    for i, num_images in enumerate([1, 1, 1, 2, 2, 3, 4, 5, 5, 6]):
        images = [noise(n, 64).resize(next(sizes)) for n in range(num_images)]
        parts = [{"type": "image", "image": image} for image in images]
        parts.insert(rng.randint(0, num_images), {"type": "text", "text": " what is\n\nthis? <row_9_col_9>"})
        messages = [{"role": "user", "content": parts}]
        expected = theirs.apply_chat_template(
            messages, template, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batch = processor(messages, images)
        assert batch.input_ids.tolist() == expected["input_ids"].tolist()
        assert batch.pixel_values.shape == expected["pixel_values"][0].shape
        assert (normalize(batch.pixel_values) - expected["pixel_values"][0]).abs().max() <= 1e-6
        if i == 3:
            logits = model(**expected).logits
            assert (ours.logits(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
            never = [ours.config.pad_token_id, ours.config.image_token_id]
            told = model.generate(**expected, do_sample=False, max_new_tokens=32, suppress_tokens=never)
            told = told[0, batch.input_ids.shape[1] :].tolist()
            end = ours.config.eos_token_id
            assert nanovlm.generate(ours, batch, max_new_tokens=32) == [
                told[: told.index(end)] if end in told else told
            ]
    assert next(sizes, None) is None


def test_smolvlm_folders_are_those_of_idefics3(tmp_path):
    make_vlm_folder(tmp_path / "a")
    make_vlm_folder(tmp_path / "b", family="smolvlm")
    (a, processor), (b, _) = nanovlm.load(tmp_path / "a"), nanovlm.load(tmp_path / "b")
    assert a.config == b.config
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    assert make_tiles(noise(0, 99), processor.config).shape == (17, 3, SIDE, SIDE)


def test_newer_image_settings_go_before_older_ones(tmp_path):
    make_vlm_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 64}}))
    assert nanovlm.load(tmp_path)[0].config.tiling.longest_edge == LONGEST
    theirs = hub.AutoProcessor.from_pretrained(tmp_path)
    assert theirs.image_processor.size["longest_edge"] == LONGEST


# ---- configs ----


def write_json(folder, **files):
    """Write files by their name without the ending."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_config_leaves_out_is_what_transformers_takes(family, tmp_path):
    theirs = getattr(hub, DECODERS[family] + "Config")
    for given in ({}, {"num_attention_heads": 8, "num_key_value_heads": None, "head_dim": None}):
        if family == "qwen3":
            given.pop("head_dim", None)
        if family in ("mistral", "mixtral", "qwen3_moe"):
            given.pop("num_key_value_heads", None)
        full = theirs(**given).to_dict()
        assert configs.read_decoder({"model_type": family} | given, tmp_path) == configs.read_decoder(full, tmp_path)


@pytest.mark.parametrize("family", VLMS)
def test_what_a_vlm_config_leaves_out_is_what_transformers_takes(family, tmp_path):
    config = getattr(hub, VLMS[family] + "Config")
    vision = config().vision_config.to_dict()
    assert configs.read_vision({}, families.IDEFICS3_VISION_DEFAULTS, tmp_path) == configs.read_vision(
        vision, {}, tmp_path
    )
    vision = hub.SiglipVisionConfig().to_dict()
    assert configs.read_vision({}, families.SIGLIP_DEFAULTS, tmp_path) == configs.read_vision(vision, {}, tmp_path)
    shared = {"model_type": family, "vision_config": {"patch_size": 16}, "pad_token_id": 0}
    for text in ({"vocab_size": 128300, "eos_token_id": 2}, {"model_type": "qwen3", "eos_token_id": 2}):
        short = configs.read_config(write_json(tmp_path / "short", config=shared | {"text_config": text}))
        config(**shared | {"text_config": text}).save_pretrained(tmp_path / "long")
        assert dataclasses.replace(configs.read_config(tmp_path / "long"), bos_token_id=None) == short
    # Without a text_config the epsilon is another.
    write_json(tmp_path / "none", config=shared | {"image_token_id": 5}, generation_config={"eos_token_id": 2})
    assert configs.read_config(tmp_path / "none").decoder.rms_norm_eps == config().text_config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LINEAR, LLAMA3, YARN, YARN | {"attention_factor": 1.5}])
def test_older_and_newer_configs_say_the_same(rope, tmp_path):
    newer = make_text("llama", rope_parameters=rope | {"rope_theta": 5e4}).to_dict() | {"dtype": "bfloat16"}
    older = {key: value for key, value in newer.items() if key not in ("rope_parameters", "dtype")}
    older |= {"torch_dtype": "bfloat16", "rope_theta": 50000, "rope_scaling": None}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        older["rope_scaling"]["type"] = rope["rope_type"]
    read = [configs.read_config(write_json(tmp_path / name, config=c)) for name, c in (("new", newer), ("old", older))]
    assert read[0] == read[1] and read[0].decoder.rope_theta == 5e4
    assert read[0].decoder.rope_scaling.type == rope["rope_type"].replace("default", "none")
    # The older one may leave the original context to the field beside it.
    position_ids = torch.arange(300)[None]
    theirs = hub.models.llama.modeling_llama.LlamaRotaryEmbedding(hub.LlamaConfig(**older))
    expected, _ = theirs(torch.ones(()), position_ids)
    assert torch.equal(rope_table(position_ids, read[1].decoder)[0][:, :, 0], expected)


# ---- special tokens ----

ENDOFTEXT = {"eos_token": "<|endoftext|>", "pad_token": None, "bos_token": "<|endoftext|>"}
COMBINATIONS = {
    # name: family of the tokenizer, tokenizer_config, stops of generation_config, pad, eos and bos
    "Llama 3": (
        "Llama-3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ["<|end_of_text|>", "<|eot_id|>"],
        ("<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    ),
    "Llama 3.1": (
        "Llama-3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        ("<|pad|>", "<|eot_id|>", "<|begin_of_text|>"),
    ),
    "Qwen2.5": (
        "Qwen2.5",
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_end|>", "<|endoftext|>"],
        ("<|endoftext|>", "<|im_end|>", None),
    ),
    "SmolLM2": (
        "SmolLM2",
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": {"content": "<|im_end|>"}},
        "<|im_end|>",
        ("<|im_end|>", "<|im_end|>", "<|im_start|>"),
    ),
    "SmolVLM": (
        "SmolVLM",
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_start|>"},
        "<end_of_utterance>",
        ("<|im_start|>", "<end_of_utterance>", "<|im_start|>"),
    ),
    "Idefics3": (  # the tokenizer still has the end of text of the language model
        "SmolVLM",
        {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"},
        ["<|endoftext|>", "<end_of_utterance>"],
        ("<end_of_utterance>", "<end_of_utterance>", "<|im_start|>"),
    ),
    "only a tokenizer": ("Qwen2.5", {"eos_token": "<|im_end|>"}, [], ("<|im_end|>", "<|im_end|>", None)),
}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_end_of_turn_is_what_the_template_writes(name, where, tmp_path):
    family, settings, stops, expected = COMBINATIONS[name]
    tokenizer = make_tokenizer(FAMILIES[family], ["<|end_of_text|>", "<|eom_id|>"])
    stops = [tokenizer.token_to_id(stop) for stop in stops] if type(stops) is list else tokenizer.token_to_id(stops)
    write_json(
        tmp_path,
        tokenizer_config=settings | {"chat_template": FAMILIES[family].template},
        generation_config={"eos_token_id": stops} if stops and where == "generation_config.json" else {},
    )
    data = {"eos_token_id": stops} if stops and where == "config.json" else {}
    ids = configs.read_special_tokens(tmp_path, data, tokenizer)
    # What else ends an answer is every other token of a list.
    others = tuple(i for i in stops if i != ids["eos_token_id"]) if type(stops) is list else ()
    assert ids.pop("stop_token_ids") == others
    names = tuple(i if i is None else tokenizer.id_to_token(i) for i in ids.values())
    assert (tuple(ids), names) == (("pad_token_id", "eos_token_id", "bos_token_id"), expected)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny Llama with the tokenizer and the template of SmolLM2, in a folder as on the hub."""
    folder = tmp_path_factory.mktemp("language_model")
    tokenizer = make_tokenizer(FAMILIES["SmolLM2"])
    model = make_model("llama", vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=2, tied=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return write_json(folder, tokenizer_config=settings | {"chat_template": FAMILIES["SmolLM2"].template})


def test_a_base_model_goes_on_with_the_text(language_model, tmp_path):
    """After what its tokenizer puts before every text, which for Llama 3 is its first token."""
    folder = shutil.copytree(language_model, tmp_path / "base")
    edit(folder / "tokenizer_config.json", lambda data: data.pop("chat_template"))
    edit(folder / "generation_config.json", dict.clear)
    _, processor = nanovlm.load(folder)
    prompt = processor.prompt([{"role": "user", "content": "what is in this\n\nimage?"}])
    expected = hub.AutoTokenizer.from_pretrained(folder)("what is in this\n\nimage?")["input_ids"]
    assert prompt.input_ids.tolist() == expected
    assert (
        processor.tokenizer.id_to_token(expected[0]) == "<|endoftext|>" != processor.tokenizer.id_to_token(expected[1])
    )


def test_a_language_model_sees_no_images(language_model):
    model, processor = nanovlm.load(language_model)
    assert model.config.vision is None and processor.config.pad_token_id == processor.config.eos_token_id
    answer = nanovlm.generate(model, processor([{"role": "user", "content": "what?"}]), max_new_tokens=5)
    assert 0 < len(answer[0]) <= 5
    with pytest.raises(ValueError, match="this model is a language model: it has no encoder for images"):
        processor([{"role": "user", "content": "what?"}], [noise(0)])


# ---- bad input ----


def split_weights(folder):
    """Replace model.safetensors by shards of one tensor each and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors), start=1):
        weight_map[name] = f"model-{i:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensors[name]}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(**fields):
    return lambda folder: edit(folder / "config.json", lambda data: data.update(fields))


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def two_tensors_of_each_kind(tensors):
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.q_norm.weight"] = tensors.pop(f"model.layers.{i}.mlp.up_proj.weight")
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.ones(3, 4)


def without_a_shard(folder):
    split_weights(folder)
    sorted(folder.glob("model-*.safetensors"))[3].unlink()


def without_weight_map(folder):
    split_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "extra.pt").write_bytes(b"")


def cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def rope(**fields):
    return change_config(rope_parameters={"rope_theta": 1e4, **fields})


BAD = {
    "shard": (without_a_shard, r"lacks model-00004-of-000\d\d.safetensors, which model.safetensors.index.json names$"),
    "index": (without_weight_map, r"model.safetensors.index.json has no weight_map from tensors to files"),
    "pickle": (
        pickled,
        r"has no model.safetensors and no model.safetensors.index.json; extra.pt, pytorch_model.bin could run any code "
        r"when read: convert it to safetensors",
    ),
    "cut off": (cut_off, r"model.safetensors is damaged or cut off"),
    "int8": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
        r"model.norm.weight in .*model.safetensors has dtype I8; only F32, F16, BF16 are read",
    ),
    "tensors": (
        change_tensors(two_tensors_of_each_kind),
        r"model.safetensors does not fit the config: model.layers.0.self_attn.o_proj.weight has shape \[3, 4\], the "
        r"config says \[48, 48\]; model.layers.\{0-1\}.mlp.up_proj.weight is missing; "
        r"model.layers.\{0-1\}.self_attn.q_norm.weight is unknown$",
    ),
    "other head": (
        change_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        r"model.safetensors has a lm_head.weight of its own, but the config says tie_word_embeddings = true",
    ),
    "no head": (change_config(tie_word_embeddings=False), r"lm_head.weight is missing"),
    "layers": (
        change_config(num_hidden_layers=1),
        r"model.layers.1.input_layernorm.weight is unknown; model.layers.1.mlp.down_proj.weight is unknown; ",
    ),
    "width": (
        change_config(intermediate_size=81),
        r"model.layers.0.mlp.down_proj.weight has shape \[48, 80\], the config says \[48, 81\]; ",
    ),
    "kind": (
        change_config(model_type="mamba"),
        r"config.json: model_type = 'mamba' is not a model that we have; there are idefics3, smolvlm, llava, ",
    ),
    "kind before tokenizer": (
        lambda folder: [change_config(model_type=["bert"])(folder), (folder / "tokenizer.json").unlink()],
        r"config.json: model_type = \['bert'\] is not a model that we have; there are idefics3, smolvlm, llava, ",
    ),
    "eos token": (
        lambda folder: edit(folder / "tokenizer_config.json", lambda data: data.update(eos_token={"content": 2})),
        r"tokenizer_config.json: eos_token = 2 must be a text",
    ),
    "template": (
        lambda folder: edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template={"a": 1})),
        r"tokenizer_config.json: chat_template = \{'a': 1\} must be a text",
    ),
    "list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        r"config.json must hold a JSON object, not a list",
    ),
    "string": (change_config(hidden_size="48"), r"config.json: hidden_size must be int, got '48'"),
    "heads": (change_config(num_attention_heads=0), r"config.json: decoder.num_attention_heads = 0 must be at least 1"),
    "groups": (change_config(num_key_value_heads=3), r"num_key_value_heads = 3 must divide .*num_attention_heads = 4"),
    "ends": (change_config(eos_token_id=["2"]), r"eos_token_id = '2' must be a number"),
    "window of Mistral": (
        change_config(model_type="mistral", sliding_window=0),
        r"config.json: sliding_window = 0 must be null or a number from 1 on$",
    ),
    "window of Mixtral": (
        change_config(model_type="mixtral", sliding_window="4"),
        r"sliding_window = '4' must be null or a number from 1 on",
    ),
    "window": (change_config(use_sliding_window=True), r"use_sliding_window = True is not supported; it must be False"),
    "layer types": (
        change_config(layer_types=["full_attention", "sliding_attention"]),
        r"config.json: layer_types = \['full_attention', 'sliding_attention'\] must say full_attention for each of 2 ",
    ),
    "quantized": (
        change_config(quantization_config={"quant_method": "bitsandbytes"}),
        r"config.json: quantization_config.quant_method = 'bitsandbytes' is not supported; there are gptq, awq",
    ),
    "activation": (change_config(hidden_act="gelu"), r"hidden_act = 'gelu' is not supported; it must be 'silu'"),
    "dynamic": (
        rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16),
        r"config.json: original_max_position_embeddings = 16 of rope_type 'dynamic' must not be below "
        r"max_position_embeddings = \d+: above it a document would change with the length of its neighbours",
    ),
    "longrope": (
        rope(rope_type="longrope", factor=2.0),
        r"rope_type = 'longrope' is not supported; there are linear, ",
    ),
    "mscale": (rope(rope_type="yarn", factor=2.0, mscale=0.7), r"mscale = 0.7 of rope_type 'yarn' is not supported"),
    "no factor": (rope(rope_type="linear"), r"config.json: rope_type 'linear' has no factor"),
    "factor": (rope(rope_type="linear", factor="2"), r"config.json: factor must be float, got '2'"),
    "theta": (rope(rope_theta="big"), r"config.json: rope_theta must be float, got 'big'"),
    "rope list": (
        change_config(rope_parameters=[1]),
        r"rope_parameters and rope_scaling must be JSON objects, got \[1\]",
    ),
    "layers without rope": (
        change_config(model_type="smollm3", no_rope_layers=[1]),
        r"config.json: no_rope_layers = \[1\] must have an entry for each of 2 layers",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"there is no .*tokenizer.json; tokenizers in other files are not read",
    ),
    "pad": (
        lambda folder: edit(folder / "tokenizer_config.json", lambda data: data.update(pad_token="a")),
        r"pad_token_id = \d+ is not a special token of the tokenizer",
    ),
}
BAD_VLM = {
    "grid": (
        change_config(vision_config=VISION | {"image_size": 640, "patch_size": 16}),
        r"config.json: 40 patches a side are refused, as Idefics3 gives some of their neighbours one position",
    ),
    "text": (change_config(text_config="llama"), r"text_config and vision_config must be JSON objects"),
    "text kind": (
        change_config(text_config={"model_type": "gpt2"}),
        r"model_type = 'gpt2' is unknown; there are llama, ",
    ),
    "vision string": (change_config(vision_config=VISION | {"patch_size": "8"}), r"patch_size must be int, got '8'"),
    "vision heads": (
        change_config(vision_config=VISION | {"num_attention_heads": 5}),
        r"config.json: vision.num_attention_heads = 5 must divide vision.hidden_size = 24",
    ),
    "shuffle": (change_config(scale_factor=3), r"scale_factor = 3 must divide .* = 4"),
    "image token": (change_config(image_token_id=5000), r"image_token_id = 5000 is outside decoder.vocab_size = "),
    "one for another": (
        change_config(image_token_id=60),
        r"image_token_id = 60 is not a special token of the tokenizer",
    ),
    "no image settings": (
        lambda folder: edit(folder / "processor_config.json", lambda data: data.pop("image_processor")),
        r"has no preprocessor_config.json, nor image settings in a processor_config.json",
    ),
    "image settings": (
        lambda folder: edit(folder / "processor_config.json", lambda data: data.update(image_processor=[1])),
        r"processor_config.json: image_processor must be a JSON object, got \[1\]",
    ),
    "patches": (
        change_config(vision_config=VISION | {"patch_size": 0}),
        r"config.json: vision.patch_size = 0 must be at least 1",
    ),
    "splitting": (
        lambda folder: edit(
            folder / "processor_config.json", lambda data: data["image_processor"].update(do_image_splitting=False)
        ),
        r"processor_config.json: do_image_splitting = False is not supported; it must be True",
    ),
    "mean": (
        lambda folder: edit(
            folder / "processor_config.json", lambda data: data["image_processor"].update(image_mean=[0.4, 0.5, 0.5])
        ),
        r"image_mean = \[0.4, 0.5, 0.5\] is not supported; it must be \[0.5, 0.5, 0.5\]",
    ),
    "size": (
        lambda folder: edit(
            folder / "processor_config.json",
            lambda data: data["image_processor"].update(size={"height": 3, "width": 3}),
        ),
        r"size = \{'height': 3, 'width': 3\} is not supported; it must have longest_edge and nothing else",
    ),
    "fake token": (
        lambda folder: edit(
            folder / "tokenizer.json",
            lambda data: [
                token.update(content="<fake>")
                for token in data["added_tokens"]
                if token["content"] == "<fake_token_around_image>"
            ],
        ),
        r"writes special tokens that the tokenizer does not have: <fake_token_around_image>",
    ),
}


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        nanovlm.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_language_models_are_named(name, language_model, tmp_path):
    change, message = BAD[name]
    folder = shutil.copytree(language_model, tmp_path / "model")
    change(folder)
    assert re.search(message, refusal(folder)), refusal(folder)


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    make_vlm_folder(folder)
    return folder


@pytest.mark.parametrize("name", BAD_VLM)
def test_bad_vlms_are_named(name, vlm_folder, tmp_path):
    change, message = BAD_VLM[name]
    folder = shutil.copytree(vlm_folder, tmp_path / "model")
    change(folder)
    assert re.search(message, refusal(folder)), refusal(folder)


def test_an_adapter_is_called_by_its_name(language_model, tmp_path):
    """With the files that PEFT writes; beside the weights of a whole model the file does not matter."""
    gone = str(tmp_path / "gone")
    folder = write_json(tmp_path / "lora", adapter_config={"peft_type": "LORA", "base_model_name_or_path": gone})
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    for refuse in (nanovlm.load, lambda name: export.export(name, tmp_path / "out")):
        with pytest.raises(
            ValueError, match=r"lora is an adapter for .*gone, which cannot be read \(there is no .*gone"
        ):
            refuse(folder)
    whole = shutil.copytree(language_model, tmp_path / "model")
    shutil.copy(folder / "adapter_config.json", whole)
    assert nanovlm.load(whole)[0].config.vision is None


def test_shards_are_read(language_model, tmp_path):
    whole, _ = nanovlm.load(language_model)
    split_weights(shutil.copytree(language_model, tmp_path / "model"))
    shards, _ = nanovlm.load(tmp_path / "model")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in shards.state_dict().items())


def test_numbers_that_are_computed_do_not_count_for_the_dtype(language_model, tmp_path):
    """Old checkpoints hold rotary frequencies in fp32 beside weights in half precision."""
    folder = shutil.copytree(language_model, tmp_path / "model")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    model, _ = nanovlm.load(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}


def test_generate_answers_with_a_hub_folder_and_refuses_in_one_sentence(vlm_folder, language_model, tmp_path):
    def call(folder, *args):
        command = [sys.executable, "generate.py", "--model", str(folder), "--prompt", "what?", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    noise(0, 90).save(tmp_path / "a.png")
    done = call(vlm_folder, "--image", str(tmp_path / "a.png"), "--max-new-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 17 * 4
    change, message = BAD["shard"]
    change(folder := shutil.copytree(language_model, tmp_path / "model"))
    done = call(folder)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and re.search(message, done.stderr.strip())
