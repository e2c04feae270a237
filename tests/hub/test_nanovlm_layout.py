"""Checkpoints of nanoVLM load: the weights of a transformers Idefics3, written under the names of nanoVLM."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig, LlamaConfig

import nanovlm
from nanovlm.config import SamplingConfig, TilingConfig
from nanovlm.data.images import make_tiles, plan_tiles
from nanovlm.hub.read import find_model
from nanovlm.infer.answers import generate
from nanovlm.model.vision import normalize
from tests.conftest import assert_ranks_fill_their_rows, noise
from tests.data.test_images import square
from tests.model.test_parity import assert_close, randomize

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLACES = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
# Fields of config.json: the image before the text, one image in it, tiles, and tiles with the whole image.
KINDS = {
    "first": {"lm_eos_token_id": 0},
    "square": {"vlm_extra_tokens": {"image_token": "<|image|>"}, "lm_chat_template": CHATML},
    "tiles": {
        "vlm_extra_tokens": {"image_token": "<|image|>", **PLACES},
        "lm_chat_template": CHATML,
        "max_img_size": 64,
        "resize_to_max_side_len": False,
    },
    "global": {
        "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **PLACES},
        "lm_chat_template": CHATML,
        "max_img_size": 64,
        "resize_to_max_side_len": True,
        "mp_image_token_length": 4,
    },
}
CONFIG = {
    "vit_hidden_dim": 24,
    "vit_inter_dim": 40,
    "vit_patch_size": 4,
    "vit_img_size": 16,
    "vit_n_heads": 2,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip2-base-patch16-512",
    "lm_hidden_dim": 32,
    "lm_inter_dim": 48,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 512,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 3,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_tokenizer": "owner/words",
    "mp_pixel_shuffle_factor": 2,
    "vlm_checkpoint_path": "checkpoints",
}


def write_tokenizer(folder):
    """A tokenizer as language models have it, without anything for images."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["user what is this? assistant Question: Answer: <image: 0> row col"] * 9, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return tokenizer


def make_idefics3(config, image_token_id, vocab_size):
    """A random Idefics3 of the sizes of a nanoVLM config."""
    torch.manual_seed(0)
    vision = Idefics3VisionConfig(
        image_size=config["vit_img_size"],
        patch_size=config["vit_patch_size"],
        hidden_size=config["vit_hidden_dim"],
        intermediate_size=config["vit_inter_dim"],
        num_hidden_layers=config["vit_n_blocks"],
        num_attention_heads=config["vit_n_heads"],
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config["lm_hidden_dim"],
        intermediate_size=config["lm_inter_dim"],
        num_hidden_layers=config["lm_n_blocks"],
        num_attention_heads=config["lm_n_heads"],
        num_key_value_heads=config["lm_n_kv_heads"],
        rms_norm_eps=config["lm_rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["lm_re_base"])},
        tie_word_embeddings=config["lm_tie_weights"],
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=vision,
            text_config=text,
            scale_factor=config["mp_pixel_shuffle_factor"],
            image_token_id=image_token_id,
            tie_word_embeddings=config["lm_tie_weights"],
        )
    ).eval()
    randomize(model)
    return model


def to_nanovlm(model, config):
    """The weights of an Idefics3 under the names of nanoVLM."""
    weights = model.state_dict()
    vision, text = "model.vision_model.", "model.text_model."
    renamed = {
        "vision_encoder.patch_embedding.conv.weight": weights[vision + "embeddings.patch_embedding.weight"],
        "vision_encoder.patch_embedding.conv.bias": weights[vision + "embeddings.patch_embedding.bias"],
        "vision_encoder.patch_embedding.position_embedding": weights[vision + "embeddings.position_embedding.weight"][
            None
        ],
        "MP.proj.weight": weights["model.connector.modality_projection.proj.weight"],
        "decoder.rotary_embd.inv_freq": torch.ones(4),
        "decoder.norm.weight": weights[text + "norm.weight"],
        "decoder.head.weight": weights["lm_head.weight"],
    }
    if not config["lm_tie_weights"]:
        renamed["decoder.token_embedding.weight"] = weights[text + "embed_tokens.weight"]
    for kind in ("weight", "bias"):
        renamed[f"vision_encoder.layer_norm.{kind}"] = weights[f"{vision}post_layernorm.{kind}"]
        for i in range(config["vit_n_blocks"]):
            ours, theirs = f"{vision}encoder.layers.{i}.", f"vision_encoder.blocks.{i}."
            qkv = [weights[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            renamed[f"{theirs}attn.qkv_proj.{kind}"] = torch.cat(qkv)
            for a, b in {"ln1": "layer_norm1", "ln2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}.items():
                renamed[f"{theirs}{a}.{kind}"] = weights[f"{ours}{b}.{kind}"]
            for name in ("mlp.fc1", "mlp.fc2"):
                renamed[f"{theirs}{name}.{kind}"] = weights[f"{ours}{name}.{kind}"]
    attention = {f"attn.{x}_proj": f"self_attn.{y}_proj" for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
    norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    mlp = {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for i in range(config["lm_n_blocks"]):
        for a, b in (attention | norms | mlp).items():
            renamed[f"decoder.blocks.{i}.{a}.weight"] = weights[f"{text}layers.{i}.{b}.weight"]
    return {name: tensor.clone() for name, tensor in renamed.items()}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Write a checkpoint of a kind, with changed fields, beside the folder of its tokenizer; return all about it."""
    monkeypatch.chdir(tmp_path)
    words = write_tokenizer(tmp_path / "owner" / "words")

    def write(kind, change_weights=None, **changes):
        config = CONFIG | KINDS[kind] | changes
        extra = list((config.get("vlm_extra_tokens") or {}).values())
        words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
        config.setdefault("lm_vocab_size", words.get_vocab_size())
        image = words.token_to_id("<|image|>" if extra else "<filename>")
        model = make_idefics3(config, image, config["lm_vocab_size"])
        weights = to_nanovlm(model, config)
        if change_weights:
            change_weights(weights)
        (tmp_path / "nano").mkdir()
        (tmp_path / "nano" / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "nano" / "model.safetensors")
        return tmp_path / "nano", words, model

    return write


def cut(image, rows, cols, has_global):
    """nanoVLM's pixels of an image that becomes rows x cols tiles: float[n, 3, 16, 16] from 0 to 1."""
    grid = image.resize((16 * cols, 16 * rows), Image.Resampling.BICUBIC)
    tiles = [grid.crop((16 * c, 16 * r, 16 * c + 16, 16 * r + 16)) for r in range(rows) for c in range(cols)]
    if has_global:
        tiles.insert(0, grid.resize((16, 16), Image.Resampling.BILINEAR))
    return torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255 for tile in tiles])


IMAGE = "<|image|>" * 4  # one tile


def grid(rows, cols):
    return "".join(f"<row_{r}_col_{c}>{IMAGE}" for r in range(1, rows + 1) for c in range(1, cols + 1))


SIZES = {"first": [(30, 50)], "square": [(30, 50)], "tiles": [(70, 40), (9, 9)], "global": [(20, 13), (16, 50)]}
TEXTS = {
    "first": "<filename>" * 4 + "Question: what is this? Answer:",
    "square": f"<|im_start|>user\n{IMAGE}what is this?<|im_end|>\n<|im_start|>assistant\n",
    "tiles": f"<|im_start|>user\n<image: 0>{grid(3, 4)}<image: 1>{grid(1, 1)}what is this?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "global": f"<|im_start|>user\n<image: 0><|global_image|>{IMAGE}{grid(3, 4)}<image: 1><|global_image|>{IMAGE}"
    f"{grid(4, 2)}what is this?<|im_end|>\n<|im_start|>assistant\n",
}
GRIDS = {"tiles": [(3, 4, False), (1, 1, False)], "global": [(3, 4, True), (4, 2, True)]}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_pixels_logits_and_answer(checkpoint, kind, tied):
    folder, words, idefics3 = checkpoint(kind, lm_tie_weights=tied)
    model, processor = nanovlm.load(str(folder))
    assert_ranks_fill_their_rows(find_model(folder))
    images = [noise(i, 64).resize(size) for i, size in enumerate(SIZES[kind])]
    batch = processor([{"role": "user", "content": "what is this?"}], images)
    ids = torch.tensor([words.encode(TEXTS[kind]).ids])
    assert torch.equal(batch.input_ids, ids)

    if kind in GRIDS:
        pixels = torch.cat([cut(image, *shape) for image, shape in zip(images, GRIDS[kind], strict=True)])
    else:
        small = images[0].resize((16, 16), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    assert (normalize(batch.pixel_values) - (2 * pixels - 1)).abs().max() < 1e-6

    assert_close(model.logits(batch), idefics3(input_ids=ids, pixel_values=pixels[None]).logits)
    theirs = idefics3.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels[None],
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=2,
        suppress_tokens=[model.config.image_token_id],
    )[0, ids.shape[1] :].tolist()
    ours = generate(model, batch, SamplingConfig(max_new_tokens=32))[0]
    assert len(ours) > 8 and ours == theirs[: len(ours)] and theirs[len(ours) :] in ([], [2])


def test_a_single_image_has_no_number(checkpoint):
    folder, words, _ = checkpoint("global")
    _, processor = nanovlm.load(folder)
    text = f"<|im_start|>user\n<|global_image|>{IMAGE}{grid(4, 4)}a?<|im_end|>\n<|im_start|>assistant\n"
    assert processor([{"role": "user", "content": "a?"}], [noise(0)]).input_ids[0].tolist() == words.encode(text).ids


def test_the_first_nanovlm_knows_questions_without_an_image_and_more_than_one(checkpoint):
    folder, words, _ = checkpoint("first")
    _, processor = nanovlm.load(folder)
    turns = [{"role": role, "content": text} for role, text in (("user", "a?"), ("assistant", "b"), ("user", "c?"))]
    text = "Question: a? Answer:b<|im_end|>Question: c? Answer:"
    assert processor(turns).input_ids[0].tolist() == words.encode(text).ids
    text = "<filename>" * 4 + "Question: a? Answer:b<|im_end|>" + "<filename>" * 4 + "Question: c? Answer:"
    turns[2]["content"] = [{"type": "image"}, {"type": "text", "text": "c?"}]
    turns[0]["content"] = [{"type": "text", "text": "a?"}, {"type": "image"}]
    assert processor(turns, [noise(0), noise(1)]).input_ids[0].tolist() == words.encode(text).ids


@pytest.mark.parametrize(
    ("size", "longest", "enlarge", "grid", "tiles"),
    [
        ((32, 32), 2048, True, (4, 4), 17),
        ((32, 32), 2048, False, (1, 1), 1),
        ((1920, 1080), 2048, True, (3, 4), 13),
        ((1000, 100), 2048, False, (1, 2), 3),
        ((100, 5000), 2048, False, (4, 1), 5),
        ((513, 512), 1536, False, (2, 2), 5),
        ((187, 187), 1536, True, (4, 3), 13),  # 187 * (1536 / 187) is above 1536 in floating point
    ],
)
def test_grids(size, longest, enlarge, grid, tiles):
    config = square(512, policy="nanovlm", longest_edge=longest, enlarge=enlarge)
    plan = plan_tiles(*size, config)
    assert ((plan.rows, plan.cols), plan.num_tiles) == (grid, tiles)


def test_what_a_file_has_twice_must_be_the_same(checkpoint):
    def double(weights):
        weights["decoder.token_embedding.weight"] = weights["decoder.head.weight"].clone()

    folder, _, _ = checkpoint("square", double)
    model, _ = nanovlm.load(folder, dtype=torch.bfloat16)
    assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16


def drop_norm(weights):
    del weights["decoder.blocks.1.norm2.weight"]


def add_tensor(weights):
    weights["decoder.extra.weight"] = torch.zeros(2)


def cut_positions(weights):
    weights["vision_encoder.patch_embedding.position_embedding"] = torch.zeros(1, 17, 24)


def other_embedding(weights):
    weights["decoder.token_embedding.weight"] = weights["decoder.head.weight"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_norm, r"does not fit the config: decoder.blocks.1.norm2.weight is missing$"),
        (add_tensor, r"does not fit the config: decoder.extra.weight is unknown$"),
        (cut_positions, r"position_embedding has shape \[1, 17, 24\], the config says \[1, 16, 24\]$"),
        (other_embedding, r"has a decoder.head.weight of its own, but the config says tie_word_embeddings = true"),
    ],
)
def test_mistakes_in_the_weights_are_named(checkpoint, change, message):
    folder, _, _ = checkpoint("global", change)
    with pytest.raises(ValueError, match=message):
        nanovlm.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_attn_scaling": 1.5}, r"config.json: lm_attn_scaling = 1.5 is not supported; it must be 1.0"),
        ({"vit_cls_flag": True}, r"config.json: vit_cls_flag = True is not supported; it must be False"),
        ({"lm_rope_factor": 2.0}, r"config.json: lm_rope_factor of another nanoVLM are not supported"),
        ({"lm_n_blocks": "3"}, r"config.json: decoder.num_hidden_layers must be int, got '3'"),
        ({"vlm_extra_tokens": {"boi_token": "<boi>"}}, r"vlm_extra_tokens has boi_token = '<boi>', which is not"),
        ({"vlm_extra_tokens": {"r1c1": "<tile>"}}, r"vlm_extra_tokens has r1c1 = '<tile>', which is not supported"),
        ({"vlm_extra_tokens": PLACES}, r"vlm_extra_tokens has no image_token"),
        ({"vlm_extra_tokens": ["<|image|>"]}, r"vlm_extra_tokens must be an object of texts, not \['<\|image\|>'\]"),
        (
            {"vlm_extra_tokens": {"image_token": 5}},
            r"vlm_extra_tokens must be an object of texts, not {'image_token': 5}",
        ),
        (
            {"vlm_extra_tokens": {"image_token": "<|image|>"}},
            r"max_img_size = 64 is not vit_img_size = 16, but vlm_ext",
        ),
        ({"max_img_size": None}, r"config.json: tiling.longest_edge must be int, got None"),
        ({"lm_n_heads": 0}, r"config.json: decoder.num_attention_heads = 0 must be at least 1"),
        ({"max_img_size": 60}, r"config.json: vision.image_size = 16 must divide tiling.longest_edge = 60"),
        ({"max_img_size": 96}, r"the tokenizer does not have: <row_1_col_5>, <row_1_col_6>"),
        ({"mp_image_token_length": 64}, r"mp_image_token_length = 64, but a tile has 4 tokens"),
        ({"lm_vocab_size": 99}, r"config.json: image_token_id = .* is outside decoder.vocab_size = 99"),
    ],
)
def test_mistakes_in_the_config_are_named(checkpoint, changes, message):
    folder, _, _ = checkpoint("global")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | changes))
    with pytest.raises(ValueError, match=message):
        nanovlm.load(folder)


def test_missing_fields_and_a_missing_tokenizer_are_named(checkpoint, monkeypatch):
    import huggingface_hub

    def refuse(repository, allow_patterns, **options):
        assert repository == "owner/elsewhere" and "tokenizer.json" in allow_patterns
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    folder, _, _ = checkpoint("global", lm_tokenizer="owner/elsewhere")
    with pytest.raises(
        ValueError, match=r"lm_tokenizer, is not in the checkpoint: there is no folder owner/elsewhere, a"
    ):
        nanovlm.load(folder)
    data = json.loads((folder / "config.json").read_text())
    del data["lm_n_heads"], data["vit_n_heads"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config.json has no lm_n_heads, vit_n_heads$"):
        nanovlm.load(folder)


def test_tiles_put_together_are_the_stretched_image_and_the_whole_is_first():
    config = square(16, policy="nanovlm", longest_edge=64)
    image = noise(1, 50).resize((50, 20))
    tiles = make_tiles(image, config)
    assert config.tiling == TilingConfig(policy="nanovlm", longest_edge=64) and tiles.shape == (9, 3, 16, 16)
    expected = (cut(image, 2, 4, True) * 255).round().to(torch.uint8)
    assert torch.equal(tiles, expected)
