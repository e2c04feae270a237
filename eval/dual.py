"""What the embeddings of a dual model are good for: retrieval, zero-shot classification, and probes of its pictures.

    python -m nanovlm.eval.dual runs/scenes_siglip/model                                   drawn scenes
    python -m nanovlm.eval.dual owner/name --retrieve captions.jsonl                       pictures with captions
    python -m nanovlm.eval.dual owner/name --classify photos/test --templates "a photo of a {}."
    python -m nanovlm.eval.dual owner/name --classify photos/test --train photos/train     k-NN and linear probe, too

Retrieval counts how often a picture's caption is among the 1, 5 or 10 most similar ones, and the reverse; all answers
of a record are captions of its picture. Classification takes the class whose name, in all templates, is most similar; a
record's first answer is its class, as the name of its folder is in a folder of classes. The probes learn from the
embeddings of --train (of drawn scenes, those of training) which classes they belong to, and need no texts.
embedding_scores.py has the definitions.
"""

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.columns import parse_fields
from nanovlm.data.dual import DualProcessor
from nanovlm.data.reader import explain
from nanovlm.data.records import references, to_sample
from nanovlm.data.scenes import CELLS, COLORS, SHAPES, Scenes
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.eval.embedding_scores import (
    choose_l2,
    embed_classes,
    knn_scores,
    linear_scores,
    recalls,
    top_accuracies,
    zero_shot,
)
from nanovlm.eval.questions import text_of
from nanovlm.hub.dual import load_dual
from nanovlm.model.dual import Dual

BATCH = 64  # pictures, or texts, that are embedded together
# Drawn scenes as a source of captions, and the parts of a caption of one object.
SPLITS = {"scenes": "test", "scenes:compositional": "compositional"}
SCENE_CLASSES = tuple(f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c, s in itertools.product(COLORS, SHAPES))
SCENE_TEMPLATES = tuple(f"{{}} at the {cell} and the digit {digit}." for cell in CELLS for digit in range(10))
ONE_OBJECT = re.compile(r"(an? \w+ \w+) at the [\w ]+ and the digit \d\.")


@dataclass(frozen=True)
class DualEvalConfig:
    # A folder of a dual model, or owner/name on the hub.
    model: str
    # What to retrieve: sources of pictures with captions, as for training; scenes and scenes:compositional are drawn
    # scenes of these splits.
    retrieve: tuple[str, ...] = ()
    # What to classify: sources of pictures whose answer is their class; scenes and scenes:compositional are drawn
    # scenes of one object, told apart by color and shape, with templates of their own.
    classify: tuple[str, ...] = ()
    # Texts in which the name of a class stands for {}.
    templates: tuple[str, ...] = ("{}",)
    # A source as those to classify, which probes are trained on.
    train: str = ""
    # The layout of the records, if it is not to be recognised, and the names of their columns, as in image=img.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch images that records name by an http or https address.
    allow_urls: bool = False
    # How many records of a source are read, from its first on.
    limit: int = 1000
    # Print one JSON object instead of lines.
    json: bool = False
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"


def main(config: DualEvalConfig) -> dict[str, dict[str, float]]:
    """Print and return the figures of each source, all between 0 and 1, with n, the number of its pictures."""
    if config.limit < 1:
        raise UserError(f"--limit {config.limit} must be at least 1")
    for template in config.templates:
        if "{}" not in template:
            raise UserError(f"--templates {template!r} has no {{}}, for which the name of a class stands")
    if config.train and not config.classify:
        raise UserError(f"--train {config.train} is for probes of what --classify names, and nothing is named")
    model, processor = load_dual(config.model, find_device(config.device))
    retrieve, classify = config.retrieve, config.classify
    if not retrieve and not classify:
        retrieve = classify = tuple(SPLITS)
    results = {f"{spec}, retrieval": retrieval(model, processor, spec, config) for spec in retrieve}
    results |= {f"{spec}, classes": classification(model, processor, spec, config) for spec in classify}
    print(json.dumps(results) if config.json else "\n".join(map(describe, results, results.values())))
    return results


def describe(name: str, figures: dict[str, float]) -> str:
    parts = (f"{key} {value if isinstance(value, int) else format(value, '.1%')}" for key, value in figures.items())
    return f"{name}: {', '.join(parts)}"


def retrieval(model: Dual, processor: DualProcessor, spec: str, config: DualEvalConfig) -> dict[str, float]:
    """Return recalls; of pictures with the same caption the first one alone is taken, as the others are as right."""
    seen, captions = set(), []

    def pictures() -> Iterator[Image.Image]:
        for picture, texts in read(spec, config):
            if seen.isdisjoint(texts):
                seen.update(texts)
                captions.append(texts)
                yield picture

    images = embed_pictures(model, processor, pictures(), spec, config.limit)
    image_of_text = torch.tensor([i for i, texts in enumerate(captions) for _ in texts], device=images.device)
    texts = embed_texts(model, processor, [text for texts in captions for text in texts])
    return {"n": len(images)} | recalls(images, texts, image_of_text)


def classification(model: Dual, processor: DualProcessor, spec: str, config: DualEvalConfig) -> dict[str, float]:
    """Return zero-shot accuracies, and those of probes if there is something to train them on."""
    images, labels = embed_labelled(model, processor, spec, config)
    train, train_labels = images[:0], []
    if config.train:
        train, train_labels = embed_labelled(model, processor, config.train, config, is_train=True)
    names, templates = sorted({*labels, *train_labels}), config.templates
    if spec in SPLITS:
        names = [*SCENE_CLASSES]
        templates = SCENE_TEMPLATES if templates == ("{}",) else templates
    if len(names) < 2:
        raise UserError(f"all pictures of {spec} are of one class, {names[0]!r}: there is nothing to tell apart")
    number = {name: i for i, name in enumerate(names)}
    own = torch.tensor([number[label] for label in labels], device=images.device)
    classes = embed_classes(lambda texts: embed_texts(model, processor, texts), names, templates)
    found = {f"zero_shot_{key}": value for key, value in zero_shot(images, classes, own).items()}
    if config.train:
        if lacking := {*train_labels} - {*names}:
            raise UserError(f"--train {config.train} has the class {min(lacking)!r}, which {spec} does not have")
        theirs = torch.tensor([number[label] for label in train_labels], device=images.device)
        scores = {
            "knn": knn_scores(train, theirs, images, len(names)),
            "linear": linear_scores(train, theirs, images, len(names), choose_l2(train, theirs, len(names))),
        }
        found |= {f"{name}_{k}": x for name, s in scores.items() for k, x in top_accuracies(s, own).items()}
    return {"n": len(images)} | found


def embed_labelled(
    model: Dual, processor: DualProcessor, spec: str, config: DualEvalConfig, is_train: bool = False
) -> tuple[Tensor, list[str]]:
    """Return the embeddings of the pictures of a source and the names of their classes."""
    labels = []

    def pictures() -> Iterator[Image.Image]:
        for picture, texts in read(spec, config, is_train):
            label = texts[0]
            if spec in SPLITS:
                if (found := ONE_OBJECT.fullmatch(label)) is None:
                    continue
                label = found[1]
            labels.append(label)
            yield picture

    return embed_pictures(model, processor, pictures(), spec, config.limit), labels


def read(spec: str, config: DualEvalConfig, is_train: bool = False) -> Iterator[tuple[Image.Image, list[str]]]:
    """Yield the picture of each record and its texts, the first answer first."""
    if spec in SPLITS:
        source, how = Scenes("train" if is_train else SPLITS[spec], kinds=("caption",)), {}
    else:
        source = open_source(spec, split="train" if is_train else "test", allow_urls=config.allow_urls)
        how = {"layout": config.layout, "fields": parse_fields(config.fields)}
    for ref in islice(first_pass(source), config.limit):
        try:
            raw = source.read(ref.key)
            sample = to_sample(raw, **how)
            own = [text_of(message) for message in sample.messages if message["role"] in ("assistant", "text")]
            right = itertools.chain.from_iterable(references(raw, **how))
            texts = list(dict.fromkeys(text.strip() for text in (*own, *right) if text.strip()))
            if len(sample.images) != 1 or not texts:
                raise UserError(
                    f"it has {len(sample.images)} pictures and {len(texts)} texts, not one picture and some"
                )
        except Exception as error:  # whatever a record does, it is named
            raise UserError(f"{ref.source}, {ref.where}: {explain(error)}") from error
        yield sample.images[0], texts


@torch.inference_mode()
def embed_pictures(
    model: Dual, processor: DualProcessor, pictures: Iterator[Image.Image], title: str, limit: int
) -> Tensor:
    """Return the embeddings fp32[n, E] of pictures, which are read as they are needed."""
    device, embedded = next(model.parameters()).device, []
    with tqdm(desc=title, total=limit, unit="picture", delay=2) as progress:
        for batch in batched(pictures):
            embedded.append(model.embed_images(processor.encode_images(batch).to(device)))
            progress.update(len(batch))
    if not embedded:
        raise UserError(f"{title} has no picture to embed")
    return torch.cat(embedded)


@torch.inference_mode()
def embed_texts(model: Dual, processor: DualProcessor, texts: list[str]) -> Tensor:
    """Return the embeddings fp32[n, E] of texts."""
    device = next(model.parameters()).device
    return torch.cat([model.embed_texts(processor.encode_texts(batch).to(device)) for batch in batched(iter(texts))])


def batched(values: Iterator) -> Iterator[list]:
    while batch := list(islice(values, BATCH)):
        yield batch


if __name__ == "__main__":
    import tyro  # only a command needs it

    cli.run(
        lambda: main(tyro.cli(DualEvalConfig, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))) and None
    )
