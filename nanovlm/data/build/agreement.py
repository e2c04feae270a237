"""Stages that ask a dual encoder: whether a record's text is about its pictures, and which pictures are alike.

A vector of a record is that of its first picture. The text is what is trained, as far as the text tower reads it.
"""

import base64
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovlm.data.build.items import Compare, Drop, Item, Judge, at_least
from nanovlm.data.build.settings import digest_weights
from nanovlm.data.reader import explain
from nanovlm.environment import find_device
from nanovlm.errors import UserError, printable
from nanovlm.hub.dual import load_dual

BLOCK = 4096  # vectors that are compared at a time


@dataclasses.dataclass(frozen=True)
class AgreementOptions:
    # A dual model: the model/ of a run, a folder in the layout of SigLIP or CLIP, or a repository of the hub.
    model: str = ""
    # Least cosine of the text and the mean of the pictures. It depends on the model: look at the report first.
    min_score: float = -1.0
    # cpu, cuda, or auto (cuda when there is one). On a GPU all is done by one process.
    device: str = "cpu"

    def __post_init__(self):
        named_model("agreement", self.model)
        at_least("agreement.min_score", self.min_score, -1)


@dataclasses.dataclass(frozen=True)
class AlikeOptions:
    # A dual model, as in agreement.
    model: str = ""
    # Least cosine of two pictures that are alike.
    min_cosine: float = 0.95
    device: str = "cpu"

    def __post_init__(self):
        named_model("alike", self.model)
        at_least("alike.min_cosine", self.min_cosine, -1)


def named_model(stage: str, model: str):
    if not model:
        raise UserError(
            f"stages.{stage}.model is empty: name a dual model, such as the model/ of a run, or leave it out"
        )


@functools.cache
def open_model(name: str, device: str):
    return load_dual(name, find_device(device), torch.float32)


def digest_model(options: AgreementOptions | AlikeOptions) -> str:
    """Return what tells the weights of a model from others."""
    return digest_weights(open_model(options.model, options.device)[0])


@torch.inference_mode()
def embed_pictures(items: Sequence[Item], model: str, device: str) -> list[Tensor | Drop]:
    """Return the vectors of each record's pictures on the CPU, fp32[n, D], or why there are none."""
    dual, processor = open_model(model, device)
    squares: list[Tensor | Drop] = []
    for item in items:
        try:
            squares.append(processor.encode_images(item.pictures))
        except Exception as error:  # whatever a record does, it is counted and named
            squares.append(Drop(printable(explain(error)), stage="corrupt"))
    tensors = [x for x in squares if isinstance(x, Tensor)]
    on = next(dual.parameters()).device
    every = torch.cat(tensors) if tensors else torch.empty(0)
    found = dual.embed_images(every.to(on)).cpu() if len(every) else torch.empty(0, dual.config.projection_size)
    parts = iter(found.split([len(x) for x in tensors]))
    return [x if isinstance(x, Drop) else next(parts) for x in squares]


def open_agreement(options: AgreementOptions) -> Judge:
    dual, processor = open_model(options.model, options.device)

    def embed_text(item: Item) -> Tensor | Drop:
        try:
            batch = processor.encode_texts(["\n".join(item.answers)])
        except UserError as error:
            return Drop(str(error))
        return dual.embed_texts(batch.to(next(dual.parameters()).device)).cpu()[0]

    @torch.inference_mode()
    def judge(items: Sequence[Item]) -> list[Drop | None]:
        drops = []
        for item, pictures in zip(items, embed_pictures(items, options.model, options.device), strict=True):
            text = embed_text(item)
            drop = next((x for x in (pictures, text) if isinstance(x, Drop)), None)
            if isinstance(pictures, Tensor) and isinstance(text, Tensor) and len(pictures):
                item.scores["agreement"] = score = round(float((pictures @ text).mean()), 4)
                item.vectors[options.model] = pictures[0]
                if score < options.min_score:
                    drop = Drop(f"agreement {score:.4f}, below {options.min_score:g}")
            drops.append(drop)
        return drops

    return judge


def mark_alike(options: AlikeOptions) -> Judge:
    """Mark each record with the vector of its first picture, "" if it has none."""

    def judge(items: Sequence[Item]) -> list[Drop | None]:
        drops = []
        missing = [item for item in items if options.model not in item.vectors]
        found = dict(zip(map(id, missing), embed_pictures(missing, options.model, options.device), strict=True))
        for item in items:
            vectors = found.get(id(item))
            if isinstance(vectors, Tensor) and len(vectors):
                item.vectors[options.model] = vectors[0]
            vector = item.vectors.get(options.model)
            item.marks["alike"] = "" if vector is None else base64.b64encode(vector.half().numpy().tobytes()).decode()
            drops.append(vectors if isinstance(vectors, Drop) else None)
        return drops

    return judge


def compare_alike(options: AlikeOptions, folder: Path) -> Compare:
    """Compare each vector with all before it, which are in a file: seconds grow with the square of the pictures."""
    file, numbers = folder / "vectors.fp16", []
    file.write_bytes(b"")

    def read(mark: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(mark), dtype=np.float16)

    def add(kept: list[int], marks: list[str]):
        with open(file, "ab") as out:
            for number, mark in zip(kept, marks, strict=True):
                if mark:
                    out.write(read(mark).tobytes())
                    numbers.append(number)

    def judge(asked: list[int], marks: list[str]) -> list[Drop | None]:
        drops: list[Drop | None] = [None] * len(marks)
        places = [i for i, mark in enumerate(marks) if mark]
        if not places:
            return drops
        own = torch.from_numpy(np.stack([read(marks[i]) for i in places]).astype(np.float32))
        like = _find_alike(own, file, options.min_cosine)
        among = own @ own.T >= options.min_cosine
        kept: list[int] = []
        for row, i in enumerate(places):
            earlier = next((k for k in kept if among[row, k]), None)
            if like[row] >= 0 or earlier is not None:
                number = numbers[like[row]] if like[row] >= 0 else asked[places[earlier or 0]]
                drops[i] = Drop(f"its picture is like that of record {number}", number)
            else:
                kept.append(row)
        add([asked[places[row]] for row in kept], [marks[places[row]] for row in kept])
        return drops

    return Compare(judge, add)


def _find_alike(own: Tensor, file: Path, least: float) -> list[int]:
    """Return the first row of a file of vectors whose cosine with each of fp32[Q, D] is large enough, -1 for none."""
    first, size = torch.full((len(own),), -1), own.shape[1]
    with open(file, "rb") as stored:
        for start in range(0, file.stat().st_size // (2 * size), BLOCK):
            block = np.frombuffer(stored.read(BLOCK * 2 * size), dtype=np.float16).reshape(-1, size)
            is_like = own @ torch.from_numpy(block.astype(np.float32)).T >= least
            row = is_like.int().argmax(1) + start
            first = torch.where((first < 0) & is_like.any(1), row, first)
    return first.tolist()
