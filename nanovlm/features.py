"""Store what a frozen image encoder makes of each picture, once, so that training need not encode pictures.

    python -m nanovlm.features FOLDER smolvlm_256m_stage1 --data.sources mine.jsonl
    python train.py smolvlm_256m_stage1 --data.sources mine.jsonl --data.features FOLDER

What follows FOLDER is what train.py is given: its encoder, tiling, sources and precision are used. A picture that is in
several records is encoded once. A command that was killed goes on, with the next shard, when it is given again.
"""

import sys

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nanovlm.command_line import parse_train
from nanovlm.config import DataConfig, TrainConfig
from nanovlm.data.features import DIGEST, INDEX, PICTURES, describe_preprocessing, digest, shard_name
from nanovlm.data.images import make_tiles
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import check, options_of, to_image
from nanovlm.data.source import Ref, Source, first_pass
from nanovlm.data.sources import open_data, open_source, sample_texts, shard_options
from nanovlm.environment import choose_precision, choose_threads, find_device, git_commit, keep_freed_memory
from nanovlm.errors import UserError, printable
from nanovlm.files import changes, flush, lock, read_json, write_file
from nanovlm.limits import time_limit
from nanovlm.model.vlm import VLM
from nanovlm.tensor_files import open_tensors
from nanovlm.train import init
from nanovlm.train.frozen import check_frozen, hash_encoder
from nanovlm.train.optim import assign_rules

PROGRESS = "progress.json"
CHUNK = 16  # records after which a shard may end
NAMED = 5  # what cannot be read is named so often, and then counted


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    # The folder to write.
    folder: Path
    # How a feature is stored: float32 exactly, bfloat16 in half the space.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Tiles that are encoded at a time.
    batch_tiles: int = 32
    # Size of a shard in MB, all of which is in memory while it is filled.
    shard_mb: int = 256

    def validate(self) -> "FeaturesConfig":
        for name in ("batch_tiles", "shard_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        return self


class Cut(NamedTuple):
    """A picture and its tiles, uint8[n, 3, S, S]: none of one that cannot be read."""

    digest: bytes
    size: tuple[int, int]
    tiles: Tensor


def main(args: list[str]):
    """Read the arguments and store the features."""
    import tyro

    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
    given, of_run = tyro.cli(
        FeaturesConfig,
        args=args,
        prog="python -m nanovlm.features",
        return_unknown_args=True,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    print(store(given.validate(), parse_train(of_run, __doc__).validate()))


def store(given: FeaturesConfig, config: TrainConfig) -> str:
    """Write the features of all pictures of a run's sources, and return a sentence about them."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(given.folder))).validate()
    if (given.folder / INDEX).exists():
        raise UserError(f"{given.folder} has features already: name another folder, or remove it")
    data, vision, device = config.data, config.model.vision, find_device(config.device)
    assert vision is not None  # as validate says
    keep_freed_memory()
    Image.MAX_IMAGE_PIXELS = data.max_pixels
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or choose_threads(device))
    precision = choose_precision(device) if config.precision == "auto" else config.precision
    texts = sample_texts(open_data(data, config.seed), 1000, options_of(data))
    model, _processor = init.start(config, texts)
    assign_rules(model, config.optim, config.adapter)
    check_frozen(model)
    model.vision.to(device).eval()
    about = {
        "encoder": hash_encoder(model.vision),
        "preprocessing": json.loads(json.dumps(describe_preprocessing(config.model))),
        "dtype": given.dtype,
        "precision": precision,
        "shape": [config.model.num_tile_patches, vision.feature_size],
        "sources": list(data.sources),
        "commit": git_commit(),
    }
    parts = [open_source(spec, allow_urls=data.allow_urls, shards=shard_options(data)) for spec in data.sources]
    with lock(given.folder) as folder:
        done = take_up(folder, about, given)
        fill_shards(folder, done, given, model, parts, data, precision == "bf16")
        return finish(folder, about, done)


def take_up(folder: Path, about: dict, given: FeaturesConfig) -> dict:
    """Return what an earlier attempt did, up to its last whole shard; nothing in a new folder."""
    settings = {**about, "shard_mb": given.shard_mb, "batch_tiles": given.batch_tiles}
    if (folder / PROGRESS).exists():
        done = read_json(folder / PROGRESS)
        if changed := changes(done["settings"], settings | {"commit": done["settings"].get("commit")}):
            raise UserError(f"{folder} was begun with other settings ({changed}): use the same, or remove it")
        return done
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    return {"settings": settings, "records": 0, "shards": 0, "unusable": 0, "seconds": 0.0}


def fill_shards(
    folder: Path, done: dict, given: FeaturesConfig, model: VLM, parts: list[Source], data: DataConfig, is_bf16: bool
):
    """Write the shards that are missing, one after the other, and what was done beside each."""
    begin, seconds = time.perf_counter(), done["seconds"]
    total = sum(len(part) for part in parts if isinstance(part, Sized)) or None
    refs = ((part, ref) for part in parts for ref in first_pass(part))
    refs, is_over = itertools.islice(refs, done["records"], None), False
    known = {bytes(row) for k in range(done["shards"]) for row in read_shard(folder, k)["digests"].numpy()}
    with tqdm(total=total, initial=done["records"], unit="record") as progress:
        while not is_over:
            shard = Shard(model, given, is_bf16)
            while not is_over and not shard.is_full():
                chunk = list(itertools.islice(refs, CHUNK))
                is_over = len(chunk) < CHUNK
                for key, picture in new_pictures(chunk, known, data, done):
                    shard.add(cut_picture(key, picture, model))
                done["records"] += len(chunk)
                progress.update(len(chunk))
            if done["shards"] and not shard.cuts:
                break  # all pictures were there already
            write_file(folder / shard_name(done["shards"]), shard.data())
            done |= {"shards": done["shards"] + 1, "seconds": round(seconds + time.perf_counter() - begin, 1)}
            write_file(folder / PROGRESS, json.dumps(done, indent=1))


def new_pictures(chunk: list[tuple[Source, Ref]], known: set[bytes], data: DataConfig, done: dict) -> Iterator[tuple]:
    """Yield the digest of each picture that was not met before, and the picture, not decoded yet.

    A record that is not understood is counted and left out, as it is in training.
    """
    options = {name: value for name, value in options_of(data).items() if name != "min_ratings"}
    for source, ref in chunk:
        try:
            with time_limit(RECORD_SECONDS, "the record"):
                pictures = check(source.read(ref.key), **options)[0]
                found = [(digest(picture, i), picture) for i, picture in enumerate(pictures)]
        except Exception as error:  # whatever a record does, it is counted and named
            done["unusable"] += 1
            if done["unusable"] <= NAMED:
                tqdm.write(printable(f"left out: {ref.source}, {ref.where}: {explain(error)}"))
            continue
        for key, picture in found:
            if key not in known:
                known.add(key)
                yield key, picture


def cut_picture(key: bytes, picture, model: VLM) -> Cut:
    """Decode a picture and cut it into its tiles."""
    try:
        with time_limit(RECORD_SECONDS, "the picture"):
            image = to_image(picture, 0)
            return Cut(key, image.size, make_tiles(image, model.config))
    except Exception:  # on damaged files, decoders raise anything; the run counts each record that shows it
        return Cut(key, (0, 0), torch.empty(0, 3, *[model.config.tile_size] * 2, dtype=torch.uint8))


class Shard:
    """Pictures and the features of their tiles, encoded in batches that depend on nothing outside of the shard."""

    def __init__(self, model: VLM, given: FeaturesConfig, is_bf16: bool):
        self.model, self.given, self.is_bf16 = model, given, is_bf16
        self.dtype = torch.bfloat16 if given.dtype == "bfloat16" else torch.float32
        self.cuts: list[tuple[bytes, tuple[int, int], int]] = []
        self.waiting, self.features, self.num_bytes = [], [], 0

    def is_full(self) -> bool:
        return self.num_bytes >= self.given.shard_mb * 2**20

    def add(self, cut: Cut):
        self.cuts.append((cut.digest, cut.size, len(cut.tiles)))
        self.waiting += cut.tiles.unbind()
        while len(self.waiting) >= self.given.batch_tiles:
            self.encode()

    @torch.no_grad()
    def encode(self):
        """Encode as many waiting tiles as make a batch."""
        tiles, self.waiting = self.waiting[: self.given.batch_tiles], self.waiting[self.given.batch_tiles :]
        device = next(self.model.vision.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.is_bf16):
            features = self.model.see(torch.stack(tiles).to(device))
        self.features.append(features.to(self.dtype).cpu())
        self.num_bytes += self.features[-1].nbytes

    def data(self) -> bytes:
        """Return the file of the shard."""
        while self.waiting:
            self.encode()
        model = self.model.config
        nothing = torch.empty(0, model.num_tile_patches, model.vision.feature_size if model.vision else 0)
        digests = np.frombuffer(b"".join(key for key, _size, _num in self.cuts), np.uint8).reshape(-1, DIGEST)
        tensors = {
            "features": torch.cat(self.features) if self.features else nothing.to(self.dtype),
            "digests": torch.from_numpy(digests.copy()),
            "sizes": torch.tensor([size for _key, size, _num in self.cuts], dtype=torch.int32).reshape(-1, 2),
            "num_tiles": torch.tensor([num for _key, _size, num in self.cuts], dtype=torch.int64),
        }
        return save(tensors)


def read_shard(folder: Path, number: int) -> dict[str, Tensor]:
    """Return what a shard says of its pictures."""
    with open_tensors(folder / shard_name(number)) as file:
        return {name: file.get_tensor(name) for name in ("digests", "sizes", "num_tiles")}


def finish(folder: Path, about: dict, done: dict) -> str:
    """Sort the pictures of all shards by their digests and write the index, which makes the folder whole."""
    shards = [read_shard(folder, number) for number in range(done["shards"])]
    digests, sizes = (torch.cat([shard[name] for shard in shards]) for name in ("digests", "sizes"))
    places = [
        torch.stack((torch.full_like(n, number), n.cumsum(0) - n, n), dim=1)
        for number, n in enumerate(shard["num_tiles"] for shard in shards)
    ]
    order = torch.from_numpy(digests.numpy().view(f"S{DIGEST}")[:, 0].argsort())
    pictures = {"digests": digests[order], "sizes": sizes[order], "places": torch.cat(places)[order]}
    write_file(folder / PICTURES, save({name: x.contiguous() for name, x in pictures.items()}))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    counts = {
        "records": done["records"],
        "unusable_records": done["unusable"],
        "pictures": len(digests),
        "unreadable_pictures": int((pictures["places"][:, 2] == 0).sum()),
        "tiles": int(pictures["places"][:, 2].sum()),
        "bytes": num_bytes,
        "seconds": done["seconds"],
    }
    write_file(folder / INDEX, json.dumps({**about, **counts}, indent=1))
    (folder / PROGRESS).unlink()
    flush(folder)
    return (
        f"wrote {folder}: features of {counts['tiles']} tiles of {counts['pictures']} pictures in {done['records']} "
        f"records, {num_bytes / 2**20:.1f} MB, in {counts['seconds']:.1f} s; {counts['unreadable_pictures']} pictures "
        f"and {counts['unusable_records']} records could not be read"
    )


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
