"""Write and index tar shards, which many readers of WebDataset read.

    python -m nanovlm.data.shards write SOURCE FOLDER         the records of a source as shards, with an index
    python -m nanovlm.data.shards index FOLDER                the index of shards that are there

SOURCE is what data.sources of train.py takes, and so is the folder once it has its index.json. A command that was
killed goes on when it is given again.
"""

import dataclasses
import sys
from pathlib import Path

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

from tqdm import tqdm

from nanovlm.data.columns import parse_fields
from nanovlm.data.shard_index import NAME, index_shard, write_index
from nanovlm.data.shard_writer import ShardSize, write_shards
from nanovlm.data.source_files import suffix_of, walk
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError, printable


@dataclasses.dataclass(frozen=True)
class WriteConfig(ShardSize):
    # What data.sources of train.py takes: scenes, a file, a folder, hub:owner/name.
    source: str = dataclasses.field(kw_only=True)
    # The folder to write.
    folder: Path = dataclasses.field(kw_only=True)
    # How many records to read, from the first on; 0 for one pass.
    num: int = 0
    # The split of drawn scenes, and of sources that have several.
    split: str = "train"
    # How records are laid out, and the names of their columns, as data.layout and data.fields of train.py.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch images that records name by an http or https address.
    allow_urls: bool = False
    # Largest share of the records that may be unusable.
    max_bad_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    # A folder of .tar files, which may be in folders of it.
    folder: Path


def write(config: WriteConfig):
    """Write the records of a source as tar shards of limited size, with an index."""
    config.validate()
    if config.num < 0:
        raise UserError(f"--num {config.num} must be at least 0")
    source = open_source(config.source, config.split, allow_urls=config.allow_urls)
    for sentence in source.damaged:
        print(f"lost: {printable(sentence)}")
    options = {"layout": config.layout, "fields": parse_fields(config.fields)}
    size, settings = ShardSize(config.max_samples, config.max_mb), dataclasses.asdict(config)
    del settings["max_bad_fraction"]  # which changes no record: a run that it ended goes on with a larger one
    write_shards(source, config.folder, size, config.num, options, config.max_bad_fraction, settings)


def index(config: IndexConfig):
    """Write index.json, and a .idx beside each shard; what is damaged keeps its whole samples, and is named."""
    files = [file for file in walk(config.folder) if suffix_of(file) == ".tar"]
    if not files:
        raise UserError(f"{config.folder} has no .tar files")
    shards = []
    for file in tqdm(files, unit="shard"):
        shards.append(index_shard(file, file.relative_to(config.folder).as_posix()))
        for loss in shards[-1].losses:
            tqdm.write(f"lost: {printable(loss)}")
    write_index(config.folder, shards)
    num_samples, num_losses = (sum(x) for x in zip(*((s.num_samples or 0, len(s.losses)) for s in shards), strict=True))
    print(f"wrote {config.folder / NAME}: {num_samples} samples in {len(shards)} shards, {num_losses} losses")


COMMANDS = {"write": (WriteConfig, write), "index": (IndexConfig, index)}


def main(args: list[str]):
    """Run the command that the first argument names."""
    cli.run_command(args, COMMANDS, "python -m nanovlm.data.shards", __doc__)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
