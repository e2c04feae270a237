"""Encoder and decoder compute what transformers' SigLIP and Llama compute, with the same random weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nanovlm.config import DecoderConfig, VisionConfig
from nanovlm.model.attention import ATTENTION, make_mask
from nanovlm.model.decoder import Decoder
from nanovlm.model.projector import pixel_shuffle
from nanovlm.model.vision import VisionEncoder
from tests.conftest import skip_without_interpreter


def randomize(model, scale=0.5):
    """Weights large enough that attention is not flat, and biases and norms that are not 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (4, 2, 16), (6, 2, 10), (3, 1, 24), (8, 1, 8)])
def test_decoder_equals_llama(attention, tied, heads, kv_heads, head_dim):
    skip_without_interpreter(attention)
    torch.manual_seed(0)
    shared = dict(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    llama = LlamaForCausalLM(
        LlamaConfig(**shared, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    ).eval()
    randomize(llama)
    decoder = Decoder(DecoderConfig(**shared, rope_theta=5000.0, attention=attention))
    weights = {name.removeprefix("model."): tensor for name, tensor in llama.state_dict().items()}
    decoder.load_state_dict({k: v for k, v in weights.items() if k != "lm_head.weight" or not tied})
    ids = torch.randint(0, 101, (2, 37))
    position_ids = torch.arange(37).expand(2, -1)
    mask = make_mask(torch.zeros(2, 37, dtype=torch.int32), torch.zeros(2, 37, dtype=torch.int32), attention)
    hidden, _routing = decoder(decoder.embed_tokens(ids), position_ids, mask)
    assert_close(hidden @ decoder.head_weight.T, llama(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("image_size", "patch_size", "layers"), [(32, 8, 2), (28, 14, 3), (24, 4, 1)])
def test_encoder_equals_siglip(attention, image_size, patch_size, layers):
    skip_without_interpreter(attention)
    torch.manual_seed(0)
    shared = dict(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=layers,
        num_attention_heads=3,
    )
    siglip = SiglipVisionModel(SiglipVisionConfig(**shared, vision_use_head=False)).eval()
    randomize(siglip)
    encoder = VisionEncoder(VisionConfig(**shared, attention=attention))
    renamed = {}
    for name, tensor in siglip.state_dict().items():
        for prefix in ("vision_model.", "embeddings.", "encoder."):
            name = name.removeprefix(prefix)
        renamed[name] = tensor
    encoder.load_state_dict(renamed)
    pixels = torch.randn(2, 3, image_size, image_size)
    assert_close(encoder(pixels), siglip(pixel_values=pixels).last_hidden_state)


def test_pixel_shuffle_equals_idefics3():
    from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    connector = Idefics3Connector(Idefics3Config())
    for side, scale in ((4, 2), (6, 3), (8, 4), (6, 2)):
        x = torch.randn(2, side * side, 5)
        assert torch.equal(pixel_shuffle(x, scale), connector.pixel_shuffle(x, scale))
