"""Pictures and texts -> vectors of length 1, by a dual model or by any decoder.

A dual model puts both into one space. A decoder stands for a text by its hidden state at the last token, which has seen
all others, or by the mean of all; the recipe of Qwen3-Embedding (arXiv 2506.05176) puts an instruction before a query
and none before a document. A decoder that was not trained for it finds little by it.
Legend: n contents, D size of a vector.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanovlm.config import pick
from nanovlm.data.chat import Processor
from nanovlm.data.dual import DualProcessor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.download import find
from nanovlm.hub.dual import load_dual
from nanovlm.hub.read import is_gguf, load
from nanovlm.model.dual import Dual
from nanovlm.model.vlm import VLM

# Qwen3-Embedding's, and how it is written.
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QUERY = "Instruct: {instruction}\nQuery:{query}"
ROW_LENGTH = 2048  # tokens that are embedded together; a longer text has a row of its own
ROW_PIXELS = 2**22  # of their pictures, 16 tiles of 512 x 512, or as many as the largest picture has
SAMPLED = 4096  # numbers of a tensor that a fingerprint looks at
DUAL_TYPES = ("siglip", "siglip2", "clip")

Content = str | Image.Image


class Embedder(NamedTuple):
    """A model that makes vectors.

    `about` says which model it is and how it is used, for the index. `prepare` makes of a content what `embed` takes,
    small enough to be kept for many; `embed` returns fp32[n, D] on the CPU. `as_query` writes a text as a query.
    `tokens` gives the characters of each token of a text, of which `longest` can be read. So many contents as `part`
    are prepared at a time.
    """

    about: dict
    sees: bool
    longest: int
    part: int
    prepare: Callable[[Content], Any]
    embed: Callable[[list], Tensor]
    as_query: Callable[[str], str]
    tokens: Callable[[str], list[tuple[int, int]]]

    def query(self, content: Content) -> Tensor:
        """Return the vector of a query, fp32[1, D]."""
        return self.embed([self.prepare(self.as_query(content) if isinstance(content, str) else content)])


def open_embedder(
    name: str,
    device: torch.device | str = "cpu",
    pooling: str = "last",
    instruction: str = INSTRUCTION,
    loaded: tuple[VLM, Processor] | None = None,
) -> Embedder:
    """Read a dual model or a decoder by the names that `load` and `load_dual` take; `loaded` is read already.

    Raises UserError that names what is missing.
    """
    if loaded is None and is_dual(name):
        return dual_embedder(name, *load_dual(find(name), device))
    return decoder_embedder(name, *(loaded or load(name, device)), pooling, instruction)


def embedder_of(
    about: dict, device: torch.device | str, name: str = "", loaded: tuple[VLM, Processor] | None = None
) -> Embedder | None:
    """Return the model of an index: `loaded` if it is that one to the bit, else read by its name, or by this one.

    None for an index without a model. Raises UserError if that of the name is another one.
    """
    if not about["vector_size"]:
        return None
    name = name or about["model"]
    if loaded is not None and fingerprint(loaded[0]) != about["fingerprint"]:
        loaded = None  # another one, or read in another precision
        print(f"the index was made by {name}, which is read too", file=sys.stderr)
    embedder = open_embedder(name, device, about.get("pooling", "last"), about.get("instruction", ""), loaded)
    if embedder.about["fingerprint"] != about["fingerprint"]:
        raise UserError(f"{name} is not the model of the index, {about['model']}, or it was trained on: index again")
    return embedder


def describe(name: str, model: nn.Module, size: int, **recipe) -> dict:
    """Return what an index keeps of a model; a folder by its full name, so that it is found from elsewhere."""
    path = str(Path(name).absolute()) if Path(name).exists() else name
    return {"model": path, "fingerprint": fingerprint(model), "vector_size": size, **recipe}


def is_dual(name: str) -> bool:
    if is_gguf(name):
        return False
    config = find(name) / "config.json"
    data = read_json(config) if config.is_file() else {}
    return data.get("model_type") in DUAL_TYPES or ("model_type" not in data and "projection_size" in data)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of names, shapes and evenly spread numbers of all weights: training changes nearly all of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        step = max(1, tensor.numel() // SAMPLED)
        sample = tensor.reshape(-1)[::step].float().cpu() if tensor.is_floating_point() else tensor.reshape(-1)[::step]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def token_places(tokenizer: Tokenizer) -> Callable[[str], list[tuple[int, int]]]:
    """Return a function from a text of any length to the characters of each of its tokens."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return lambda text: plain.encode(text, add_special_tokens=False).offsets


# --- a dual model ----------------------------------------------------------------------------------------------


def dual_embedder(name: str, model: Dual, processor: DualProcessor) -> Embedder:
    device = next(model.parameters()).device

    def prepare(content: Content) -> str | Tensor:
        return content if isinstance(content, str) else processor.encode_images([content])

    @torch.inference_mode()
    def embed(prepared: list[str | Tensor]) -> Tensor:
        vectors = torch.empty(len(prepared), model.config.projection_size)
        texts = {i: content for i, content in enumerate(prepared) if isinstance(content, str)}
        images = {i: content for i, content in enumerate(prepared) if isinstance(content, Tensor)}
        for some in batches([*texts], 64):
            batch = processor.encode_texts([texts[i] for i in some])
            vectors[some] = model.embed_texts(batch.to(device)).cpu()
        for some in batches([*images], 16):
            vectors[some] = model.embed_images(torch.cat([images[i] for i in some]).to(device)).cpu()
        return vectors

    about = describe(name, model, model.config.projection_size)
    longest = model.config.text.max_position_embeddings - 2  # beside the tokens at both ends
    return Embedder(about, True, longest, 256, prepare, embed, lambda text: text, token_places(processor.tokenizer))


def batches(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


# --- a decoder -------------------------------------------------------------------------------------------------


def decoder_embedder(name: str, model: VLM, processor: Processor, pooling: str, instruction: str) -> Embedder:
    pool = pick(POOLING, pooling, "pooling")
    longest, device = model.config.decoder.max_position_embeddings, next(model.parameters()).device

    def prepare(content: Content) -> Document:
        if isinstance(content, str):
            document = processor.text_document([{"type": "text", "text": content}])
        else:
            document = processor.prompt([{"role": "user", "content": "Describe the image."}], [content])
        if len(document) > longest:
            raise UserError(f"a text of {len(document)} tokens is longer than the {longest} that {name} can read")
        return document

    @torch.inference_mode()
    def embed(prepared: list[Document]) -> Tensor:
        vectors = torch.empty(len(prepared), model.config.decoder.hidden_size)
        lengths = [len(document) for document in prepared]
        tiles = [len(document.tiles) for document in prepared]
        most_tiles = max([ROW_PIXELS // max(1, model.config.tile_size**2), *tiles])
        for row in pack(lengths, tiles, max([ROW_LENGTH, *lengths]), most_tiles):
            documents = [prepared[i] for i in row]
            batch = collate([make_row(documents, sum(map(len, documents)), processor.config.pad_token_id)]).to(device)
            vectors[row] = F.normalize(pool(model(batch), batch).float(), dim=-1).cpu()
        return vectors

    def as_query(text: str) -> str:
        return QUERY.format(instruction=instruction, query=text) if instruction else text

    about = describe(name, model, model.config.decoder.hidden_size, pooling=pooling, instruction=instruction)
    sees, tokens = model.config.vision is not None, token_places(processor.tokenizer)
    part = 32 if sees else 256  # a picture may have many tiles
    return Embedder(about, sees, longest - 2, part, prepare, embed, as_query, tokens)


def pool_last(hidden: Tensor, batch: Batch) -> Tensor:
    """[B, T, D] -> [J, D]: the last token of each document."""
    doc_ids = batch.doc_ids.flatten()
    is_last = (doc_ids >= 0) & (doc_ids != F.pad(doc_ids[1:], (0, 1), value=-1))
    return hidden.flatten(0, 1)[is_last]


def pool_mean(hidden: Tensor, batch: Batch) -> Tensor:
    """[B, T, D] -> fp32[J, D]: the mean over each document."""
    doc_ids = batch.doc_ids.flatten().long()
    lengths = doc_ids[doc_ids >= 0].bincount()
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
    return sums.index_add(0, doc_ids[doc_ids >= 0], hidden.flatten(0, 1)[doc_ids >= 0].float()) / lengths[:, None]


POOLING = {"last": pool_last, "mean": pool_mean}
