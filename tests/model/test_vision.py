"""Image encoders: those of transformers with random weights, positions, tokens beside the patches, two encoders."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers as hub
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from nanovlm.config import VisionConfig
from nanovlm.model.convolution import ConvolutionBlock, ConvolutionStem, stage_widths
from nanovlm.model.decoder import rotate_both
from nanovlm.model.vision import ACTIVATIONS, VisionEncoder, normalize, rope_table
from nanovlm.model.vlm import VLM
from nanovlm.train import init
from tests.conftest import TINY
from tests.model.test_parity import randomize

SHARED = dict(image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
CLIP = VisionConfig(
    **SHARED,
    intermediate_size=48,
    layer_norm_eps=1e-5,
    patch_bias=False,
    class_token=True,
    hidden_act="quick_gelu",
    pre_layernorm=True,
)
DINO = VisionConfig(**SHARED, intermediate_size=64, class_token=True, hidden_act="gelu", layer_scale=True)


def load(encoder: nn.Module, theirs: nn.Module, names: dict[str, str]):
    """Copy weights by replacing parts of their names; positions and tokens of theirs have a dimension more."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    own = encoder.state_dict()
    encoder.load_state_dict({name: tensors[name].reshape(own[name].shape) for name in own})


def draw(encoder: VisionEncoder) -> VisionEncoder:
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


@torch.no_grad()
def test_clip_and_its_layers():
    """Its pooled token is ours; LLaVA's features, those before the last block, are those of one block less."""
    torch.manual_seed(0)
    clip = hub.CLIPVisionModel(hub.CLIPVisionConfig(**SHARED, intermediate_size=48)).eval()
    randomize(clip)
    names = {"embeddings.": "", "encoder.": "", "pre_layrnorm": "pre_layernorm"}
    pixels = torch.randn(3, 3, 28, 28)
    theirs = clip(pixel_values=pixels, output_hidden_states=True)
    for less, after in ((0, theirs.last_hidden_state), (1, theirs.hidden_states[-2])):
        config = dataclasses.replace(CLIP, num_hidden_layers=2 - less, post_layernorm=False)
        encoder = VisionEncoder(config)
        load(encoder, clip, names)
        torch.testing.assert_close(encoder(pixels), after[:, 1:], rtol=1e-5, atol=1e-5)
    encoder = VisionEncoder(CLIP)
    load(encoder, clip, names)
    torch.testing.assert_close(encoder.forward_all(pixels)[:, 0], theirs.pooler_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 3])
def test_dinov2_with_and_without_registers(num_registers):
    torch.manual_seed(0)
    if num_registers:
        config = hub.Dinov2WithRegistersConfig(**SHARED, mlp_ratio=2, num_register_tokens=num_registers)
        dino = hub.Dinov2WithRegistersModel(config).eval()
    else:
        dino = hub.Dinov2Model(hub.Dinov2Config(**SHARED, mlp_ratio=2)).eval()
    randomize(dino)
    encoder = VisionEncoder(dataclasses.replace(DINO, num_registers=num_registers))
    names = {
        "embeddings.cls_token": "class_embedding",
        "embeddings.register_tokens": "registers",
        "embeddings.position_embeddings": "position_embedding.weight",
        "embeddings.patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attention.o_proj": "self_attn.out_proj",
        "attention.": "self_attn.",
        ".lambda1": "",
    }
    load(encoder, dino, names | {"layernorm.": "post_layernorm."})
    pixels = torch.randn(2, 3, 28, 28)
    theirs = dino(pixel_values=pixels)
    torch.testing.assert_close(encoder(pixels), theirs.last_hidden_state[:, 1 + num_registers :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.forward_all(pixels)[:, 0], theirs.pooler_output, rtol=1e-5, atol=1e-5)


def test_activations_are_those_of_transformers():
    x = torch.linspace(-6, 6, 101)
    for name, theirs in (
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("gelu", "gelu"),
        ("quick_gelu", "quick_gelu"),
        ("silu", "silu"),
    ):
        torch.testing.assert_close(ACTIVATIONS[name](x), hub.activations.ACT2FN[theirs](x), rtol=1e-6, atol=1e-6)
    assert len(ACTIVATIONS) == 4


def test_rotary_positions_are_those_of_qwen2_vl():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    torch.manual_seed(0)
    config = dataclasses.replace(DINO, positions="rotary", rope_theta=500.0)
    places, (q, k) = torch.randint(0, 50, (20, 2)), torch.randn(2, 1, 20, 2, 16)
    theirs = Qwen2VLVisionConfig(embed_dim=32, num_heads=2)
    theirs.rope_parameters["rope_theta"] = 500.0
    cos, sin = qwen.Qwen2VLVisionRotaryEmbedding(theirs)(q, places)
    expected = qwen.apply_rotary_pos_emb_vision(q[0], k[0], cos, sin)
    for ours, their in zip(rotate_both(q, k, rope_table(places, config)), expected, strict=True):
        torch.testing.assert_close(ours[0], their, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rotary_scores_depend_on_offsets_between_patches_alone():
    """All patches have one content, so what is left in their scores is where they are."""
    torch.manual_seed(0)
    config = dataclasses.replace(DINO, positions="rotary", num_registers=2, num_hidden_layers=1, rope_theta=20.0)
    encoder, seen = draw(VisionEncoder(config)), []
    encoder.layers[0].self_attn.attend = lambda q, k, v, mask: seen.append((q, k)) or v
    encoder(torch.randn(1, 3, 1, 1).expand(1, 3, 28, 28))
    scores = torch.einsum("tnh,snh->nts", *(x[0] for x in seen[0]))
    patches = scores[:, 3:, 3:].unflatten(2, (4, 4)).unflatten(1, (4, 4))  # [heads, row, column, row, column]
    by_offset = {}
    for a, b, c, d in itertools.product(range(4), repeat=4):
        by_offset.setdefault((c - a, d - b), []).append(patches[:, a, b, c, d])
    for offset, found in by_offset.items():
        torch.testing.assert_close(torch.stack(found), found[0].expand(len(found), -1), rtol=1e-4, atol=1e-3)
        assert offset == (0, 0) or (found[0] - by_offset[0, 0][0]).abs().min() > 1e-2, offset
    assert (by_offset[0, 1][0] - by_offset[1, 0][0]).abs().min() > 1e-2  # rows are no columns
    assert "position_embedding.weight" not in encoder.state_dict()


@torch.no_grad()
def test_registers_are_read_and_not_returned():
    torch.manual_seed(0)
    encoder, pixels = draw(VisionEncoder(dataclasses.replace(DINO, num_registers=3))), torch.randn(2, 3, 28, 28)
    before, whole = encoder(pixels), encoder.forward_all(pixels)
    assert before.shape == (2, 16, 32) and whole.shape == (2, 1 + 3 + 16, 32) and before.equal(whole[:, 4:])
    encoder.registers[1] = torch.randn(32)  # not by a constant, which layer norms take away
    assert (encoder(pixels) - before).abs().max() > 1e-3


@torch.no_grad()
def test_pixels_are_normalised_by_the_mean_and_std_of_the_encoder():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    exact = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalize(pixels, mean, std).double(), exact, rtol=1e-5, atol=1e-5)
    assert normalize(pixels).equal(pixels.float() / 127.5 - 1)
    model = VLM(dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, mean=mean, std=std)))
    tiles = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert model.encode(tiles).equal(model.encode(normalize(tiles, mean, std)))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(28, 7), (30, 7), (20, 5)], ids=str)
def test_a_second_encoder_sees_the_same_patches(sizes):
    """Its features follow those of the first, of the same pixels as it normalises them."""
    torch.manual_seed(0)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    second = dataclasses.replace(CLIP, image_size=sizes[0], patch_size=sizes[1], mean=mean, std=std)
    config = dataclasses.replace(DINO, image_size=30, second=second)
    encoder = draw(VisionEncoder(config))
    tiles = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    features = encoder(normalize(tiles))
    assert features.shape == (2, 16, config.feature_size) and config.feature_size == 64
    assert features[..., :32].equal(encoder.forward_all(normalize(tiles))[:, 1:])
    shown = normalize(tiles, mean, std)[..., :28, :28]
    if sizes[1] == 5:
        shown = F.interpolate(shown, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(features[..., 32:], encoder.second(shown), rtol=1e-4, atol=1e-4)


CONVOLUTION = VisionConfig(
    image_size=35, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)


@torch.no_grad()
def test_convolutions_see_places_in_the_order_of_the_patches():
    """Without blocks a pixel moves the features of its own patch alone, with them those of neighbours."""
    torch.manual_seed(0)
    assert stage_widths(CONVOLUTION) == [8, 16, 32]
    for num_blocks in (0, 1):
        stem = draw(ConvolutionStem(dataclasses.replace(CONVOLUTION, convolution_blocks=num_blocks)))
        pixels = torch.randn(2, 3, 35, 35)
        pixels[:, :, 32:] = pixels[:, :, :, 32:] = torch.nan  # beyond the last whole patch
        before = stem(pixels)
        assert before.shape == (2, 16, 32)
        for row, column in ((0, 0), (1, 2), (3, 1)):
            changed = pixels.clone()
            changed[1, :, 8 * row, 8 * column + 7] += 3
            moved = ((stem(changed) - before).abs().amax(-1) > 0).int()
            assert moved[1, 4 * row + column] == 1 and moved[0].sum() == 0
            assert (moved[1].sum() == 1) == (num_blocks == 0)


@torch.no_grad()
def test_a_convolution_stage_is_that_of_convnext():
    torch.manual_seed(0)
    config = hub.ConvNextConfig(num_channels=3, hidden_sizes=[8, 16], depths=[2, 2], layer_norm_eps=1e-6)
    theirs = ConvNextLayer(config, 16)
    ours = ConvolutionBlock(16, CONVOLUTION)
    ours.fc1, ours.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)  # it is wider
    theirs.layer_scale_parameter = None
    names = {"depthwise": "dwconv", "norm": "layernorm", "fc1": "pwconv1", "fc2": "pwconv2"}
    for mine, their in names.items():
        getattr(ours, mine).load_state_dict(getattr(theirs, their).state_dict())
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": "convolution", "patch_size": 6}, "vision.patch_size = 6 must be a power of 2"),
        ({"positions": "rotary", "num_attention_heads": 16}, "4 .* must divide vision.hidden_size / .* = 2"),
        ({"num_registers": -1}, "vision.num_registers = -1 must be at least 0"),
        ({"std": (0.5, 0.0, 0.5)}, "vision.std = 0.0 must be positive"),
        ({"second": dataclasses.replace(TINY.vision, patch_size=8)}, "vision.second has 2 patches a side, vision 4"),
        ({"second": dataclasses.replace(TINY.vision, num_hidden_layers=0)}, "second.num_hidden_layers = 0 must be at"),
        ({"patches": "tiles"}, "vision.patches = 'tiles' is unknown; there are patch, convolution"),
        ({"hidden_act": "relu"}, "vision.hidden_act = 'relu' is unknown; there are gelu_tanh, gelu, quick_gelu"),
    ],
)
def test_what_an_encoder_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VLM(dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **changes)))


OTHERS = {
    "class token and registers": {"class_token": True, "num_registers": 2, "pre_layernorm": True, "layer_scale": True},
    "rotary": {"positions": "rotary", "num_registers": 1, "post_layernorm": False},
    "convolution": {"patches": "convolution", "patch_size": 4},
    "two": {"second": dataclasses.replace(TINY.vision, image_size=32, patch_size=8, hidden_size=16, class_token=True)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_weight_is_drawn_learns_and_is_used(kind):
    """Weights on the meta device get the same values, and ranks that need it get a gradient of each."""
    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **OTHERS[kind]))
    torch.manual_seed(0)
    model = VLM(config)
    with torch.device("meta"):
        later = VLM(config)
    later.to_empty(device="cpu")
    for parameter in later.parameters():
        parameter.detach().fill_(torch.nan)
    torch.manual_seed(0)
    init.draw(later)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(later.state_dict()[name]), name
    model.encode(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)).square().sum().backward()
    for name, parameter in (*model.vision.named_parameters(), *model.projector.named_parameters()):
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has_gradient or name.endswith("k_proj.bias"), name  # which softmax takes out
