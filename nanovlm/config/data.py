"""The settings of data: which records are read, how they become rows, and what is held out."""

from dataclasses import dataclass, field
from typing import Literal

from nanovlm.config.fields import check


@dataclass(frozen=True)
class VideoConfig:
    # Largest number of frames that are shown of a video, evenly spread over it.
    num_frames: int = 16
    # How many frames are shown of a second, where these are fewer; 0 for num_frames of every video.
    fps: float = 1.0
    # Longest video that is read, in seconds; a longer one is corrupt.
    max_seconds: float = 3600.0

    def validate(self, where: str = "data.video."):
        """Raise UserError with the first value that no video can have; options of a command begin with --."""
        for name, is_right, needed in (
            ("num_frames", 1 <= self.num_frames <= 999, "from 1 to 999"),
            ("fps", self.fps >= 0, "at least 0"),
            ("max_seconds", self.max_seconds > 0, "above 0"),
        ):
            shown = where + name.replace("_", "-") if where.startswith("--") else where + name
            check(is_right, f"{shown} = {getattr(self, name)} must be {needed}")


@dataclass(frozen=True)
class DataConfig:
    # Where the samples come from: scenes (scenes:color,cells for only these kinds of questions), documents
    # (documents:receipt,chart for only these kinds), files (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .tar; globs
    # and {000..127}), a folder, hub:owner/name, or tar shards at an address.
    sources: tuple[str, ...] = ("scenes",)
    # How often each source is read, relative to the others; without weights, each sample once an epoch.
    weights: tuple[float, ...] = ()
    # Above 0, the weights, or without them the sizes of the sources, to the power of 1 / temperature: 1 reads by size,
    # higher ones favour small sources, and a very high one reads all alike.
    temperature: float = 0.0
    # Passes over a source of a mixture after which it is left out, and the others share its part: one number for all,
    # or one for each source; 0 for no limit.
    max_passes: tuple[float, ...] = ()
    # Stages of the run: the number of samples of each but the last, which goes on to the end. Then weights has those of
    # all sources for the first stage, then those for the second, and so on; some may be 0.
    stages: tuple[int, ...] = ()
    # How weights become those of the next stage: at its begin (step), or along the stage before it (linear).
    stage_change: Literal["step", "linear"] = "step"
    # Read the sources in turn, as lessons: the number of samples of each but the last, which goes on to the end.
    lessons: tuple[int, ...] = ()
    # Tokens in a packed row; a longer document is too long.
    row_length: int = 256
    # What becomes of a document that is too long for a row: skip counts it and leaves it out; shrink first cuts its
    # images into fewer tiles, as many as fit.
    too_long: Literal["skip", "shrink"] = "skip"
    # Largest number of image tiles in a packed row, and so of a document; 0 for no limit.
    max_tiles: int = 0
    # Largest number of pixels of an image; one with more is corrupt. The default is that of the largest phone cameras.
    max_pixels: int = 200_000_000
    # Fetch images that records name by an address, http or https, of a public server.
    allow_urls: bool = False
    # Tar shards that are read as a stream, from an address or by an index.json: how many are shuffled together.
    shard_window: int = 8
    # Where those from an address are kept; empty for ~/.cache/nanovlm/shards.
    shard_cache: str = ""
    # About how many gigabytes of them are kept; those that were not used for longest go first.
    shard_cache_gb: float = 100.0
    # A folder of what the frozen encoder makes of each picture, which is read in place of the picture (python -m
    # nanovlm.features); empty to encode pictures at every step.
    features: str = ""
    # Passes over the data after which the run ends, if its steps do not end first; 0 for no limit.
    num_epochs: int = 0
    # Worker processes of each rank that read samples; 0 reads in the training process.
    num_workers: int = 0
    # Share of the pictures that are held out of training, with every record that shows one; of records without
    # pictures, the share of texts.
    val_fraction: float = 0.0
    # Lowest accepted ratings of a turn in FineVision: relevance, visual dependency, image correspondence, formatting.
    min_ratings: tuple[int, int, int, int] = (0, 0, 0, 0)
    # How records are laid out, a key of nanovlm.data.layouts.LAYOUTS; empty to recognise it by the keys of each.
    layout: str = ""
    # Columns of other names, as name=column: image=img question=q answer=a; images=left,right for a list of several.
    fields: tuple[str, ...] = ()
    # Stop when more than this share of the samples is corrupt or too long.
    max_bad_fraction: float = 0.05
    # Rows in a batch (a micro-batch, when gradients are accumulated).
    batch_rows: int = 16
    # Documents to choose from when rows are packed; more of them leave less padding and need more memory.
    pack_buffer: int = 128
    # Read the source in a new order on each pass.
    shuffle: bool = True
    # Size of the byte-level BPE vocabulary that is made from the data where no model brings a tokenizer.
    tokenizer_size: int = 640
    # Also give such a tokenizer PaliGemma's 1024 location tokens, <loc0000> to <loc1023>, in which boxes and points are
    # written (scenes:box_tokens,point_tokens).
    location_tokens: bool = False
    # How messages are written, a key of nanovlm.data.tokenizer.CHAT_TEMPLATES: roles (ours), chatml (as SmolLM2 and
    # Qwen) or completion (for base models); empty for the tokenizer's own way.
    chat_template: str = ""
    # What of a conversation is trained: its answers, or all of its text. Documents that are text with pictures among it
    # are trained whole.
    train_on: Literal["answers", "all"] = "answers"
    # Which frames are shown of a record's video.
    video: VideoConfig = field(default_factory=VideoConfig)

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        self.video.validate()
        check(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction = {self.max_bad_fraction} must be between 0 and 1"
        )
        check(0 <= self.val_fraction < 1, f"data.val_fraction = {self.val_fraction} must be at least 0 and below 1")
        check(self.sources, "data.sources is empty: name your records, as in --data.sources mine.jsonl")
        num, num_stages = len(self.sources), len(self.stages) + 1
        check(
            len(self.weights) in ((num * num_stages,) if self.stages else (0, num)),
            f"data.weights has {len(self.weights)} entries, data.sources {num}"
            + (f" and data.stages {num_stages} with the last: it needs {num * num_stages}" if self.stages else ""),
        )
        check(all(length > 0 for length in self.stages), f"data.stages = {self.stages} must be positive")
        check(
            self.stages or self.stage_change == "step",
            f"data.stage_change = {self.stage_change} needs data.stages: give the number of samples of each",
        )
        check(
            self.temperature >= 0,
            f"data.temperature = {self.temperature} must be above 0, or 0 to leave the weights as they are",
        )
        check(
            len(self.max_passes) in (0, 1, num) and all(number >= 0 for number in self.max_passes),
            f"data.max_passes = {self.max_passes} must be one number, or one for each of the {num} data.sources, of at "
            "least 0",
        )
        for name, value in (("temperature", self.temperature), ("max_passes", self.max_passes)):
            check(not (value and self.lessons), f"data.{name} = {value} is of a mixture, and data.lessons makes none")
            check(not value or num > 1, f"data.{name} = {value} is of a mixture: give several data.sources")
        check(
            not self.max_passes or self.weights or self.temperature,
            f"data.max_passes = {self.max_passes} is of a mixture: give data.weights, or data.temperature, such as 1",
        )
        check(self.shard_cache_gb > 0, f"data.shard_cache_gb = {self.shard_cache_gb} must be above 0")
        check(
            len(self.lessons) in (0, len(self.sources) - 1),
            f"data.lessons has {len(self.lessons)} entries; it needs one for each of the {len(self.sources)} "
            "data.sources but the last, or none",
        )
        check(not (self.lessons and self.weights), "data.lessons and data.weights exclude each other: give one of them")
        check(all(length > 0 for length in self.lessons), f"data.lessons = {self.lessons} must be positive")
