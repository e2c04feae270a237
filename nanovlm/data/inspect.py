"""Look at data as the model gets it: the text of one sample, which tokens are trained, and how samples pack.

    python -m nanovlm.data.inspect photos.jsonl --preset small                           as `train.py small` gets it
    python -m nanovlm.data.inspect photos.jsonl --index 7 --tokens --model runs/demo/model

Trained tokens are on green, or ⟦in brackets⟧ where the output is no terminal; ↵ is a newline of the text, and \\<image>
a text that only looks like a special token (not with --tokens, which shows such a text by its pieces). The picture has
the tiles of the sample, the lengths of the samples and their packed rows.
"""

import io
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanovlm import cli
from nanovlm.config import DataConfig, TrainConfig, VLMConfig, from_dict, pick
from nanovlm.data.chat import Processor
from nanovlm.data.drawing import describe, draw_histogram, draw_rows, draw_tiles, histogram, render, show_text, stack
from nanovlm.data.images import marker_tokens
from nanovlm.data.packing import image_cost, pack
from nanovlm.data.packing_baselines import STRATEGIES
from nanovlm.data.process import make_process
from nanovlm.data.reader import Reader, Skipped, explain
from nanovlm.data.records import options_of
from nanovlm.data.source import Source, first_pass
from nanovlm.data.sources import open_source, sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATES, train_tokenizer
from nanovlm.data.types import IGNORE, Document
from nanovlm.errors import UserError
from nanovlm.files import read_json, refuse_run
from nanovlm.presets import PRESETS

NAMED = 3  # skipped samples to name for each reason


def report(name: str, documents: list[Document], skipped: list[tuple[int, Skipped]], damaged, config) -> str:
    """Summarise many samples: lengths, trained tokens, what was skipped and how full the rows become."""
    lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
    trained = sum(int((d.labels != IGNORE).sum()) for d in documents)
    number = len(documents) + len(skipped)
    lines = [f"{number} samples of {name}: {len(documents)} documents, {len(skipped)} skipped"]
    lines += [f"    lost: {sentence}" for sentence in damaged]
    kinds = defaultdict(list)
    for index, (kind, reason) in skipped:
        kinds[kind].append(f"sample {index}: {reason}")
    for kind, sentences in kinds.items():
        lines += [f"  {len(sentences)} {kind}", *(f"    {show_text(sentence)}" for sentence in sentences[:NAMED])]
        lines += [f"    and {len(sentences) - NAMED} more"] if len(sentences) > NAMED else []
    if not documents:
        return "\n".join(lines)
    lines += ["", f"  {'tokens':>15}  documents   (median {statistics.median(lengths):.0f}, mean "
              f"{statistics.mean(lengths):.0f}; {100 * trained / sum(lengths):.1f} % trained; "
              f"{sum(num_tiles) / len(documents):.1f} tiles a document)"]  # fmt: skip
    bins = histogram(lengths)
    most = max(count for _first, _last, count in bins)
    for first, last, count in bins:
        label = str(first) if first == last else f"{first} to {last}"
        lines.append(f"  {label:>15}  {'█' * (count and max(1, round(40 * count / most)))} {count or ''}".rstrip())
    limit = f" and at most {config.max_tiles} tiles" if config.max_tiles else ""
    lines += ["", f"  {f'rows of {config.row_length} tokens{limit}':<41} rows   fill %   most tiles   left out"]
    for strategy, function in STRATEGIES.items():
        rows, widths = function(lengths, num_tiles, config.row_length, config.max_tiles or None)
        fill = 100 * sum(lengths[i] for row in rows for i in row) / max(1, sum(widths))
        tiles = max((sum(num_tiles[i] for i in row) for row in rows), default=0)
        left_out = len(lengths) - sum(map(len, rows))
        lines.append(f"    {strategy:<37} {len(rows):6} {fill:8.1f} {tiles:12} {left_out:10}")
    return "\n".join(lines)


# --- the command -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectConfig:
    # What to look at: scenes, a .jsonl file, .parquet or .tar files, a folder, or hub:owner/name.
    source: str
    # Which sample to show.
    index: int = 0
    # How many samples to summarise: drawn from the whole source, or the first of a stream.
    num: int = 200
    # The preset of train.py whose tokenizer, tiling and rows to use.
    preset: str = "scenes"
    # Model folder whose tokenizer, template and tiling to use in place of the preset's.
    model: Path | None = None
    # PNG file to write.
    out: Path = Path("inspect.png")
    # Tokens in a packed row; a longer document is skipped. 0 takes that of the preset, or of the run of the model.
    row_length: int = 0
    # Most tiles in a packed row; 0 takes that of the preset, or of the run of the model.
    max_tiles: int = 0
    # How records are laid out, and the names of their columns, as data.layout and data.fields of train.py; empty takes
    # those of the run of the model, if there are any.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch images that records name by an http or https address.
    allow_urls: bool = False
    # Show where tokens end.
    tokens: bool = False
    # Seed of the choice of samples to summarise.
    seed: int = 0


def load_processor(folder: Path) -> Processor:
    """Read the processor of a model folder. Raises UserError that names what is missing or wrong."""
    refuse_run(folder)
    path = folder / "config.json"
    try:
        config = from_dict(VLMConfig, json.loads(path.read_bytes())).validate()
    except OSError as error:
        raise UserError(f"{folder} is no model folder: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Processor.load(folder, config)


def read_data_config(folder: Path) -> DataConfig:
    """Return how the run that a model folder lies in reads its data; long rows for a model of elsewhere."""
    if not (folder.parent / "config.json").is_file():
        return DataConfig(row_length=2048)
    saved = read_json(folder.parent / "config.json").get("data", {})
    return from_dict(DataConfig, saved, f"{folder.parent / 'config.json'}: data.")


def make_processor(source: Source, preset: TrainConfig) -> Processor:
    """Train a tokenizer on the source, as a run of the preset does."""
    texts, markers = sample_texts(source, 1000, options_of(preset.data)), marker_tokens(preset.model)
    template = pick(CHAT_TEMPLATES, preset.data.chat_template or "roles", "data.chat_template")
    return Processor(train_tokenizer(texts, preset.data.tokenizer_size, markers), template, preset.model)


def main(config: InspectConfig):
    """Print the sample and the summary, and write the picture."""
    for name, least in (("index", 0), ("num", 1), ("row_length", 0), ("max_tiles", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {least}")
    preset = pick(PRESETS, config.preset, "--preset")()
    if config.model is not None:
        preset = replace(preset, data=read_data_config(config.model))
    if config.model is None and (preset.init.model or preset.init.decoder):
        raise UserError(f"--preset {config.preset} starts from a model of others: name its folder by --model")
    data = replace(
        preset.data,
        row_length=config.row_length or preset.data.row_length,
        max_tiles=config.max_tiles or preset.data.max_tiles,
        layout=config.layout or preset.data.layout,
        fields=config.fields or preset.data.fields,
        val_fraction=0.0,
        features="",
    )
    source = open_source(config.source, allow_urls=config.allow_urls or data.allow_urls)
    if isinstance(source, Sized) and config.index >= len(source):
        raise UserError(f"--index {config.index}: {source.name} has only {len(source)} samples")
    processor = (
        make_processor(source, replace(preset, data=data)) if config.model is None else load_processor(config.model)
    )

    process = make_process(processor, data)

    try:
        if isinstance(source, Sized):
            key = config.index
        else:
            key = next((ref.key for ref in itertools.islice(first_pass(source), config.index, None)), None)
        document = None if key is None else process(source.read(key))
    except Exception as error:  # whatever a record does, it is named
        raise UserError(f"{source.name}, sample {config.index}: {explain(error)}") from error
    if document is None:
        raise UserError(f"{source.name} ends before sample {config.index}")
    print(f"{source.name}, sample {config.index}: {describe(document)}\n")
    print(render(document, processor, config.tokens, sys.stdout.isatty()) + "\n")

    if isinstance(source, Sized):
        chosen = np.random.default_rng(config.seed).choice(len(source), min(config.num, len(source)), replace=False)
        keys = ((i, i) for i in sorted(chosen.tolist()))
    else:
        keys = ((ref.number, ref.key) for ref in itertools.islice(first_pass(source), config.num))
    reader = Reader(source, process, data, "train")
    results = [(index, reader.read(key)) for index, key in keys]
    documents = [result for _index, result in results if isinstance(result, Document)]
    skipped = [(index, result) for index, result in results if isinstance(result, Skipped)]
    print(report(source.name, documents, skipped, source.damaged, data))

    lengths, num_tiles = [len(d) for d in documents], [len(d.tiles) for d in documents]
    if not documents:
        raise UserError(f"no sample of {source.name} could be used, so there is nothing to draw")
    rows = pack(lengths, num_tiles, data.row_length, data.max_tiles or None, [image_cost(d) for d in documents])
    parts = [draw_tiles(document, processor)] if len(document.tiles) else []
    parts += [draw_histogram(lengths), draw_rows(rows, lengths, data.row_length)]
    png = io.BytesIO()
    stack(parts).save(png, "PNG")
    try:
        config.out.write_bytes(png.getvalue())
    except OSError as error:
        raise UserError(f"the picture cannot be written: {error}") from error
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    import tyro

    cli.run(lambda: main(tyro.cli(InspectConfig, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))
