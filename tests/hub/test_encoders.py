"""Image encoders of the hub become those of a model: features equal transformers', mistakes are named."""

import dataclasses
import json

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file

from nanovlm.data.chat import Processor
from nanovlm.hub.encoders import load_encoder, read_encoder
from nanovlm.hub.export import check_exportable
from nanovlm.hub.families import VISION_FIELDS, check_vision
from nanovlm.model.vlm import VLM
from tests.conftest import TINY
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")
hub.utils.logging.disable_progress_bar()

VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
TOWER = VISION | {"intermediate_size": 40}
TEXT = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3)
# What transformers' configs say beside the sizes, by names of tests: a kind of encoder and how it is stored.
ENCODERS = {
    "siglip": lambda: hub.SiglipVisionModel(hub.SiglipVisionConfig(**TOWER)),
    "siglip no head": lambda: hub.SiglipVisionModel(hub.SiglipVisionConfig(**TOWER, vision_use_head=False)),
    "siglip both towers": lambda: hub.SiglipModel(hub.SiglipConfig(vision_config=TOWER, text_config=TEXT)),
    "clip": lambda: hub.CLIPVisionModel(hub.CLIPVisionConfig(**TOWER)),
    "clip projected": lambda: hub.CLIPVisionModelWithProjection(hub.CLIPVisionConfig(**TOWER, hidden_act="gelu")),
    "clip both towers": lambda: hub.CLIPModel(hub.CLIPConfig(vision_config=TOWER, text_config=TEXT)),
    "dinov2": lambda: hub.Dinov2Model(hub.Dinov2Config(**VISION, mlp_ratio=2)),
    "dinov2 classifier": lambda: hub.Dinov2ForImageClassification(hub.Dinov2Config(**VISION, mlp_ratio=2)),
    "dinov2 registers": lambda: hub.Dinov2WithRegistersModel(
        hub.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=3)
    ),
}


def make(kind, folder):
    """Write a random encoder as transformers does; return the one that it computes features with."""
    torch.manual_seed(0)
    model = ENCODERS[kind]().eval()
    encoder = getattr(model, "vision_model", getattr(model, "dinov2", model))
    randomize(encoder)
    model.save_pretrained(folder)
    return encoder


def change(folder, tensors):
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})


def read(folder, **changes) -> VLM:
    """Read an encoder into a model, whose other weights keep their values."""
    vision = dataclasses.replace(read_encoder(folder), **changes)
    model = VLM(dataclasses.replace(TINY, vision=vision))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("vision.")}
    for tensor in model.vision.parameters():
        tensor.detach().fill_(torch.nan)
    load_encoder(model.state_dict(), folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_those_of_transformers(kind, tmp_path, capsys):
    encoder = make(kind, tmp_path)
    if kind.startswith("clip"):  # as older versions wrote it
        root = "vision_model." if kind != "clip" else ""
        change(tmp_path, {f"{root}embeddings.position_ids": torch.arange(17)[None]})
    pixels = torch.randn(3, 3, 32, 32)
    with_norm = "post_layernorm" if kind.startswith("clip") else ""
    model = read(tmp_path, **({with_norm: False} if with_norm else {}))  # CLIP's features are those before the norm
    theirs = encoder(pixel_values=pixels).last_hidden_state[:, -16:]
    assert (model.vision(pixels) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    said = capsys.readouterr().err
    assert ("head.probe" in said) == (kind in ("siglip", "siglip both towers"))
    assert ("post_layernorm" in said) == ("position_ids" in said) == kind.startswith("clip")
    assert ("text_model" in said) == ("logit_scale" in said) == kind.endswith("both towers")
    assert ("mask_token" in said) == kind.startswith("dinov2") and ("classifier" in said) == kind.endswith("classifier")
    assert bool(said) == (kind != "siglip no head")


@torch.no_grad()
def test_names_of_the_hub_and_of_earlier_versions(tmp_path):
    """An encoder alone may have the names that it has in a pair."""
    siglip = make("siglip", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, 32, 32)
    theirs = siglip(pixel_values=pixels).last_hidden_state
    assert (read(tmp_path).vision(pixels) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_features_before_the_last_block_are_those_that_llava_takes(tmp_path, capsys):
    clip = make("clip", tmp_path)
    model = read(tmp_path, num_hidden_layers=1, post_layernorm=False)
    pixels = torch.randn(2, 3, 32, 32)
    theirs = clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert (model.vision(pixels) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert "encoder.layers.1.mlp.fc1.weight" in capsys.readouterr().err


def test_pixels_are_normalised_as_the_files_say(tmp_path):
    """Else as encoders of the kind do, which transformers' image processors say."""
    for kind, processor in (
        ("siglip", hub.SiglipImageProcessor),
        ("clip", hub.CLIPImageProcessor),
        ("dinov2", hub.BitImageProcessor),
    ):
        folder = tmp_path / kind
        make(kind, folder)
        default = read_encoder(folder)
        if kind != "dinov2":  # whose checkpoints have a preprocessor_config.json with ImageNet's
            assert (list(default.mean), list(default.std)) == (processor.image_mean, processor.image_std)
        assert kind != "dinov2" or default.mean == (0.485, 0.456, 0.406)
        processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
        read = read_encoder(folder)
        assert (read.mean, read.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"rescale_factor": 1 / 127.5}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: rescale_factor = 0.0078.* it must be 0.0039"):
        read_encoder(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn = True is not supported; it must be False"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias = False is not supported; it must be True"),
        ("dinov2", {"hidden_act": "relu"}, "hidden_act = 'relu' is unknown; there are gelu_pytorch_tanh, gelu, quick"),
        ("clip", {"num_channels": 4}, "num_channels = 4 is not supported; it must be 3"),
        ("clip", {"image_size": [32, 16]}, r"image_size must be int, got \[32, 16\]"),
        ("clip", {"patch_size": 64}, "vision.patch_size = 64 is above vision.image_size = 32"),
        (
            "clip",
            {"model_type": "siglip3"},
            "model_type = 'siglip3' is no image encoder that we have; there are sig",
        ),
    ],
)
def test_what_is_not_supported_is_named(kind, changes, message, tmp_path):
    make(kind, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | changes))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_encoder(tmp_path)


def test_an_unknown_tensor_beside_an_encoder_is_named(tmp_path):
    make("siglip", tmp_path)
    change(tmp_path, {"embeddings.extra": torch.ones(2)})
    with pytest.raises(ValueError, match=r"does not fit the config: embeddings.extra is unknown$"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["clip", "dinov2 registers"])
def test_no_layout_of_other_programs_has_such_an_encoder(kind, tmp_path, processor):
    make(kind, tmp_path)
    config = dataclasses.replace(TINY, vision=read_encoder(tmp_path))
    theirs = Processor(processor.tokenizer, processor.chat_template, config)
    with pytest.raises(ValueError, match=r"^vision\.\w+ = .* cannot be exported: Idefics3, the layout in which"):
        check_exportable(theirs)
    check_vision(TINY.vision)
    check_vision(dataclasses.replace(TINY.vision, attention="flex", **dict.fromkeys(VISION_FIELDS, 4)))
