"""Records -> the same records with a category of a taxonomy of two levels, which a model finds likeliest.

```yaml
animals: [dogs, cats]
vehicles: [cars, boats]
documents: []
```

A model is asked for the category and writes nothing: the log-probability of each name that is allowed is compared, so
no record can make it answer anything else. "other" is allowed on both levels, and a name that is not likely enough
becomes it. `category` is then animals/dogs, animals/other, documents or other.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from nanovlm.config.fields import check
from nanovlm.data.build.carry import as_line, carry
from nanovlm.data.build.questions.write import show_words
from nanovlm.data.build.records import BuildConfig, Found, Unusable, write_records
from nanovlm.data.build.yaml_file import read_yaml
from nanovlm.data.chat import Processor
from nanovlm.data.sources import open_source
from nanovlm.data.types import Sample
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.infer.likelihood import check_branches, option_scores
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM

OTHER = "other"
MOST_NAMES = 100  # of a level
PROMPT = "Which of these fits {} best: {}? Answer with its name alone."


@dataclasses.dataclass(frozen=True)
class LabelConfig(BuildConfig):
    # The taxonomy, a YAML file: names, and of each a list of names.
    taxonomy: Path = Path()
    # Smallest probability, among the names that are allowed, at which a name is not replaced by "other".
    least_probability: float = 0.0

    def validate(self):
        super().validate()
        check(self.taxonomy != Path(), "--taxonomy names no file: give a YAML file with names and lists of names")
        check(0 <= self.least_probability <= 1, f"--least-probability {self.least_probability} must be between 0 and 1")


def main(config: LabelConfig):
    """Write the records of a source with a category that a model gives each."""
    config.validate()
    taxonomy = read_taxonomy(config.taxonomy)
    keep_freed_memory()
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, find_device(config.device))
    check_branches(model.config.decoder)
    prepare(model)
    digest = hashlib.sha256(json.dumps(taxonomy).encode()).hexdigest()[:16]
    noted = dataclasses.replace(config, taxonomy=Path(digest))  # so that a command that goes on notices another one
    write_records(noted, source, model, lambda records: label(model, processor, records, taxonomy, config))


def read_taxonomy(path: Path) -> dict[str, list[str]]:
    """Read a taxonomy. Raises UserError that names the file and what is wrong with it."""
    what = "names, and of each a list of names, as animals: [dogs]"
    data = read_yaml(path, what)
    check(data, f"{path} must hold {what}")
    taxonomy = {name: [] if below is None else below for name, below in data.items()}
    for level, where in (
        (list(taxonomy), "its first level"),
        *((below, f"{name}") for name, below in taxonomy.items()),
    ):
        check(isinstance(level, list), f"{path}: {where} must be a list of names, not {level!r}")
        for name in level:
            is_name = isinstance(name, str) and name.strip() == name and name and "/" not in name and "\n" not in name
            check(is_name, f"{path}: {where} has {name!r}, which is no name: a text without / and line breaks")
            check(name != OTHER, f"{path}: {where} has {OTHER!r}, which is there already")
        check(len({*level}) == len(level), f"{path}: {where} has a name twice")
        check(len(level) <= MOST_NAMES, f"{path}: {where} has {len(level)} names, more than {MOST_NAMES}")
    return taxonomy


def label(
    model: VLM, processor: Processor, records: list[Found], taxonomy: dict[str, list[str]], config: LabelConfig
) -> list[dict | Unusable]:
    """Return each record with `category` and, of each of its levels, `category_probabilities`."""
    names: list[list[str]] = [[] for _ in records]
    chances: list[list[float]] = [[] for _ in records]
    failed: dict[int, Unusable] = {}
    for level in (0, 1):
        asked: list[tuple[int, Sample, list[str]]] = []
        for i, found in enumerate(records):
            allowed = list(taxonomy) if level == 0 else taxonomy.get(names[i][0], []) if names[i] else []
            if allowed and i not in failed:
                question = make_question(found, [*allowed, OTHER])
                if isinstance(question, Unusable):
                    failed[i] = question
                else:
                    asked.append((i, question, [*allowed, OTHER]))
        for (i, _question, allowed), result in zip(asked, choose(model, processor, asked), strict=True):
            if isinstance(result, Unusable):
                failed[i] = result
                continue
            best = max(range(len(allowed)), key=result.__getitem__)
            names[i].append(allowed[best] if result[best] >= config.least_probability else OTHER)
            chances[i].append(round(result[best], 4))
    return [failed.get(i) or labelled(found, "/".join(names[i]), chances[i], config) for i, found in enumerate(records)]


def make_question(found: Found, allowed: Sequence[str]) -> Sample | Unusable:
    """Return what is asked about a record: its picture alone or, where it has none, its words."""
    listed = ", ".join(allowed)
    if found.sample.images:
        parts = [{"type": "image"} for _ in found.sample.images]
        return Sample(found.sample.images, [{"role": "user", "content": [*parts, say(PROMPT.format("it", listed))]}])
    reasons: dict = {}
    words = show_words(found, reasons)
    if not words:
        return Unusable(f"its words are not shown to the model: {reasons.get('words', 'there are none')}")
    text = "\n".join(["-----", *(word.replace("\n", " ") for word in words), "-----"])
    return Sample([], [{"role": "user", "content": [say(f"{text}\n{PROMPT.format('the text', listed)}")]}])


def say(text: str) -> dict:
    return {"type": "text", "text": text}


def choose(
    model: VLM, processor: Processor, asked: list[tuple[int, Sample, list[str]]]
) -> list[list[float] | Unusable]:
    """Return the probabilities of the names that are allowed, which add up to 1."""
    try:
        scores = option_scores(model, processor, [a[1] for a in asked], [a[2] for a in asked]) if asked else []
    except UserError as error:
        if len(asked) == 1:
            return [Unusable(str(error))]
        return [result for one in asked for result in choose(model, processor, [one])]  # which of them it is
    return [softmax([total for total, _num in of_one]) for of_one in scores]


def softmax(values: list[float]) -> list[float]:
    shares = [math.exp(value - max(values)) for value in values]
    return [share / math.fsum(shares) for share in shares]


def labelled(found: Found, category: str, chances: list[float], config: BuildConfig) -> dict:
    """Return a record with its category and all else that it has."""
    more = {"category": category, "category_probabilities": chances}
    return as_line(carry(found.number, found.raw, config.options), **more)
