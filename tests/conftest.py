"""A tiny model, its processor, and small documents, shared by the tests."""

import dataclasses

import pytest
import torch
from PIL import Image

from nanovlm.config import DecoderConfig, VisionConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.sources import Scenes, sample_texts, to_sample
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.model.attention import ATTENTION
from nanovlm.model.vlm import VLM

TINY = VLMConfig(
    vision=VisionConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    decoder=DecoderConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    ),
)


@pytest.fixture(scope="session")
def processor():
    return Processor(train_tokenizer(sample_texts(Scenes("train"), 50), 512), CHAT_TEMPLATE, TINY)


@pytest.fixture(params=sorted(ATTENTION))
def model(request):
    """A random tiny model for each attention backend."""
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.decoder, attention=request.param)
    return VLM(dataclasses.replace(TINY, decoder=decoder)).eval()


def noise(seed, size=16):
    """An image of random pixels."""
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_raw(seed, *turns, images=1, **extra):
    """A raw record with random images and (question, answer) turns."""
    texts = [{"user": user, "assistant": assistant} for user, assistant in turns]
    return {"images": [noise(seed + i) for i in range(images)], "texts": texts, **extra}


def make_document(processor, seed, *turns, **options):
    return processor.document(to_sample(make_raw(seed, *turns, **options)))


def make_batch(documents, row_length=None, rows=1):
    """Deal documents out to rows in order."""
    dealt = [documents[i::rows] for i in range(rows)]
    row_length = row_length or max(sum(map(len, row)) for row in dealt)
    return collate([make_row(row, row_length, TINY.pad_token_id) for row in dealt])
