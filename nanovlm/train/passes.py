"""How far the data of a run reach: the steps that passes over them give, and what became of the records."""

from collections.abc import Sized

from nanovlm.config import TrainConfig
from nanovlm.data.loader import Loader
from nanovlm.data.packing import pack
from nanovlm.data.reader import why_too_long
from nanovlm.data.source import Source
from nanovlm.data.sources import sample_records


def describe_counts(counts: dict[str, int], source: Source) -> str:
    """Say what became of the records each time that one was read; the numbers add up to the reads."""
    kinds = {
        "trained": counts["packed"],
        "not reached by the last step": counts["documents"] - counts["packed"],
        "held out": counts["other split"],
        "filtered": counts["filtered"],
    }
    shown = [f"{number} {kind}" for kind, number in kinds.items() if number]
    shown += [f"{counts[kind]} {kind}" for kind in ("too long", "corrupt")]
    of = f"of {len(source)} records" if isinstance(source, Sized) else "of records"
    fewer = f"; {counts['shrunk']} took fewer tiles (data.too_long)" if counts["shrunk"] else ""
    lost = f"; {counts['damaged']} losses of unknown numbers of records" if counts["damaged"] else ""
    return f"{counts['read']} reads {of}: {', '.join(shown)}{fewer}{lost}"


def estimate_steps(source: Source, loader: Loader, config: TrainConfig, num_updates: int = 1) -> int:
    """Estimate, to about a fifth, the steps in all passes over a source, from the rows that 200 records fill.

    `num_updates` steps are taken on what is read for one.
    """
    assert isinstance(source, Sized)
    data, documents, records = config.data, [], list(sample_records(source, 200))
    for raw in records:
        if data.val_fraction and not loader.reader.is_of_split(raw):
            continue
        try:
            document = loader.reader.process(raw)
        except Exception:
            continue  # the loader counts and names it
        if not why_too_long(document, data):
            documents.append((len(document), len(document.tiles)))
    buffers = [documents[i : i + data.pack_buffer] for i in range(0, len(documents), data.pack_buffer)]
    num_rows = sum(
        len(pack([length for length, _ in b], [tiles for _, tiles in b], data.row_length, data.max_tiles or None))
        for b in buffers
    )
    passes = data.num_epochs * len(source) / max(1, len(records))
    return num_updates * max(1, round(num_rows * passes / (data.batch_rows * config.optim.micro_batches)))
