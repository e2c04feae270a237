"""Runs that start from encoders of the hub: CLIP, DINOv2, fewer blocks, two side by side."""

import dataclasses

import pytest
import torch
from einops import rearrange
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nanovlm.config import AdapterConfig, DataConfig, InitConfig, ProjectorConfig, TrainConfig
from nanovlm.hub.encoders import SIGLIP, read_encoder, stretch_table
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vision import convert_pixels, normalize
from nanovlm.model.vlm import VLM
from nanovlm.train import init
from tests.conftest import TINY
from tests.model.test_parity import randomize

CLIP = dict(
    image_size=16, patch_size=4, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2
)
WITHOUT_SIZE = {name: value for name, value in CLIP.items() if name != "image_size"}
DINO = dict(image_size=24, patch_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for name, encoder in (
        ("clip", CLIPVisionModel(CLIPVisionConfig(**CLIP))),
        ("dino", Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO))),
    ):
        randomize(encoder)
        encoder.save_pretrained(folder / name)
    return folder


def make_config(encoder, /, scale_factor=2, **parts):
    model = dataclasses.replace(TINY, vision=encoder, projector=ProjectorConfig(scale_factor=scale_factor))
    return TrainConfig(model=model, data=DataConfig(tokenizer_size=300), init=InitConfig(**parts)).validate()


def start(config):
    torch.manual_seed(1)
    return init.start(config, ["a red circle", "two blue squares"] * 40)


@torch.no_grad()
def test_two_encoders_of_the_hub_side_by_side(hub, tmp_path, capsys):
    """LLaVA's features of CLIP, and DINOv2's of the same pixels; then both out of the model that has them."""
    clip, dino = read_encoder(hub / "clip"), read_encoder(hub / "dino")
    vision = dataclasses.replace(clip, num_hidden_layers=2, post_layernorm=False, second=dino)
    config = make_config(vision, vision=str(hub / "clip"), second=str(hub / "dino"))
    model, processor = start(config)
    tiles = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pixels = normalize(tiles, clip.mean, clip.std)
    theirs = CLIPVisionModel.from_pretrained(hub / "clip")(pixel_values=pixels, output_hidden_states=True)
    beside = Dinov2WithRegistersModel.from_pretrained(hub / "dino")
    expected = torch.cat(
        (
            theirs.hidden_states[-2][:, 1:],
            beside(pixel_values=convert_pixels(pixels, clip, dino)).last_hidden_state[:, -16:],
        ),
        dim=-1,
    )
    assert (model.vision(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.projector.proj.in_features == 4 * (24 + 16)
    said = capsys.readouterr().err
    assert "encoder.layers.2.mlp" in said and "mask_token" in said
    save_model(tmp_path / "both", model, processor)
    again, _ = start(make_config(vision, vision=str(tmp_path / "both")))
    other, _ = start(make_config(vision, vision=str(tmp_path / "both"), second=str(hub / "dino")))
    alone, _ = start(make_config(dataclasses.replace(vision, second=None), vision=str(tmp_path / "both")))
    for name, tensor in model.vision.state_dict().items():
        assert again.vision.state_dict()[name].equal(tensor) and other.vision.state_dict()[name].equal(tensor), name
        assert name.startswith("second.") or alone.vision.state_dict()[name].equal(tensor), name
    random, _ = start(make_config(vision, vision=str(hub / "clip")))
    assert random.vision.layers[0].mlp.fc1.weight.equal(model.vision.layers[0].mlp.fc1.weight)
    assert not random.vision.second.layers[0].mlp.fc1.weight.equal(model.vision.second.layers[0].mlp.fc1.weight)


STRETCHED = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**CLIP)),
    "dino": (Dinov2Model, Dinov2Config(**DINO)),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**DINO)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**CLIP, vision_use_head=False)),
    "naflex": (Siglip2VisionModel, Siglip2VisionConfig(**WITHOUT_SIZE, num_patches=16, vision_use_head=False)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STRETCHED)
def test_positions_are_stretched_as_transformers_does(tmp_path, capsys, name):
    """For pictures of more and of fewer patches; and once more out of a model of ours."""
    cls, settings = STRETCHED[name]
    torch.manual_seed(0)
    encoder = cls(settings).eval()
    randomize(encoder)
    encoder.save_pretrained(tmp_path / "hub")
    own = read_encoder(tmp_path / "hub")
    asked = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    if name == "clip":  # its features are those before the norm
        own = dataclasses.replace(own, post_layernorm=False)
    for side in (own.grid_size + 3, own.grid_size - 2):
        vision = dataclasses.replace(own, image_size=side * own.patch_size)
        model, processor = start(make_config(vision, vision=str(tmp_path / "hub"), scale_factor=1))
        pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
        theirs = {"pixel_values": pixels} | asked
        if name == "naflex":  # which is given patches
            patches = rearrange(pixels, "I C (y a) (x b) -> I (y x) (a b C)", y=side, x=side)
            theirs = {"pixel_values": patches, "spatial_shapes": torch.tensor([[side, side]] * 2)}
            theirs["pixel_attention_mask"] = torch.ones(patches.shape[:2])
        expected = encoder(**theirs).last_hidden_state[:, -(side**2) :]
        assert (model.vision(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert f"4 x 4, are stretched to {side} x {side}" in capsys.readouterr().err
    save_model(tmp_path / "model", model, processor)
    again, _ = start(make_config(own, vision=str(tmp_path / "model"), scale_factor=1))
    assert "2 x 2, are stretched to 4 x 4" in capsys.readouterr().err
    small, table = model.vision.position_embedding.weight, again.vision.position_embedding.weight
    assert table.equal(stretch_table(small, model.config.vision, 4, SIGLIP.stretch))


def test_an_encoder_that_is_not_the_configured_one_is_refused(hub):
    clip, dino = read_encoder(hub / "clip"), read_encoder(hub / "dino")
    for vision, parts, message in (
        (dataclasses.replace(clip, num_hidden_layers=4), {"vision": "clip"}, "vision.num_hidden_layers: 3 against 4"),
        (dataclasses.replace(clip, mean=(0.5,) * 3), {"vision": "clip"}, r"vision.mean: \(0.481.* against \(0.5, 0.5"),
        (dataclasses.replace(clip, second=dino), {"second": "clip"}, "vision.second.patch_size: 4 against 6"),
        (clip, {"vision": "dino"}, "dino, which differs from the config: .*vision.num_registers: 4 against 0"),
    ):
        with pytest.raises(ValueError, match=message):
            start(make_config(vision, **{field: str(hub / name) for field, name in parts.items()}))
    with pytest.raises(ValueError, match=r"init.second = 'x' needs a second image encoder, but model.vision.second"):
        make_config(clip, second="x")
    with pytest.raises(ValueError, match=r"init.model = 'a' brings all parts: .* init.second = 'b'"):
        make_config(dataclasses.replace(clip, second=dino), model="a", second="b")


def test_a_random_encoder_beside_adapters_must_learn(hub, tmp_path, processor):
    """An encoder is random where neither its own files nor those of the encoder beside it have it."""
    clip, dino = read_encoder(hub / "clip"), read_encoder(hub / "dino")
    vision = dataclasses.replace(clip, second=dino)
    config = make_config(vision, vision=str(hub / "clip"), second=str(hub / "dino"))
    both, language = tmp_path / "both", tmp_path / "language"
    save_model(both, start(config)[0], processor)
    save_model(language, VLM(dataclasses.replace(TINY, vision=None, image_token_id=None)), processor)

    def begin(train, **parts):
        adapter = AdapterConfig(rank=2, train=("^projector", *train))
        parts = InitConfig(decoder=str(language), **{field: str(folder) for field, folder in parts.items()})
        init.prepare(dataclasses.replace(config, adapter=adapter, init=parts).validate(), ())

    for train, parts, part in (
        ([], {"vision": hub / "clip"}, "vision.second"),
        ([], {"second": hub / "dino"}, "vision"),
        (["^vision.second"], {}, "vision"),
    ):
        with pytest.raises(
            ValueError, match=rf"{part}\.\w+ begins with random values .*: add \^{part} to adapter.train"
        ):
            begin(train, **parts)
    begin([], vision=hub / "clip", second=hub / "dino")
    begin([], vision=both)
    begin([r"^vision\.(?!second)"], second=hub / "dino")
