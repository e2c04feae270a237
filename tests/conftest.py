"""A tiny model, its processor, and small documents, shared by the tests; where kernels run."""

import dataclasses
import importlib.util
import os
import signal

import pytest
import torch

# Read when triton is imported, which nothing above does.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from PIL import Image

from nanovlm.config import DecoderConfig, VisionConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.source import Order, deal
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub.stored import read_model
from nanovlm.model import attention
from nanovlm.model.attention import ATTENTION
from nanovlm.model.vlm import VLM
from nanovlm.sharded import Rows

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    importlib.import_module("tests.kernels.interpreter")

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


def pytest_configure():
    """Forget that whoever runs the tests may be a rank of a job; the ranks that tests start import this file too."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    # A shell has it ignored for what runs in the background, and what tests start would ignore it, too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device():
    """Where kernels run: compiled on a GPU where there is one, else interpreted on the CPU."""
    if not HAS_TRITON:
        pytest.skip("needs triton, which has no wheel for this platform")
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module")
def one_thread():
    """Compute in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def skip_without_interpreter(backend):
    """Skip a test on the CPU of a backend that computes there only when Triton interprets."""
    if backend == "triton" and (HAS_GPU or not HAS_TRITON):
        pytest.skip("needs Triton's interpreter, which takes the place of a GPU")


@pytest.fixture(scope="session")
def processor():
    return Processor(train_tokenizer(sample_texts(Scenes("train"), 50), 512), CHAT_TEMPLATE, TINY)


@pytest.fixture(params=[*sorted(ATTENTION), "sdpa by documents"])
def model(request, monkeypatch):
    """A random tiny model for each attention backend of the decoder; half of it where the backend is slow on a CPU."""
    backend, by_documents = request.param.removesuffix(" by documents"), request.param.endswith("by documents")
    skip_without_interpreter(backend)
    if by_documents:  # which rows as short as those of most tests do not pay
        monkeypatch.setattr(attention, "CALL", -(10**9))
    torch.manual_seed(0)
    fewer = {} if backend == "sdpa" else dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    decoder = dataclasses.replace(TINY.decoder, attention=backend, **fewer)
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


def assert_ranks_fill_their_rows(stored, num_ranks=3):
    """Compare what each rank reads of a model on disk with the rows that it has of the model read whole."""
    whole = read_model(stored, "cpu", None)[0].state_dict()
    for rank in range(num_ranks):
        places = {}
        for name, tensor in whole.items():
            size = (len(tensor) + num_ranks - 1) // num_ranks
            rows = torch.full_like(tensor, 7)[rank * size : (rank + 1) * size]
            places[name] = Rows(rows, tensor.shape, min(rank * size, len(tensor)))
        stored.fill(places)
        for name, rows in places.items():
            assert rows.equal(whole[name]), (rank, name)


class Numbers:
    """A source of known size whose records are numbers."""

    damaged, blocks, order = (), None, Order()

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def refs(self, slots, num_slots, start=None):
        return deal(self, slots, num_slots, start)

    def read(self, key):
        assert 0 <= key < self.length
        return {"number": (self.name, key)}
