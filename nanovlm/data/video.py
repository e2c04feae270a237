"""A video file -> Clip: some of its frames and their times -> pictures with text among them.

```
bytes --demux--> time of every frame --choose--> some of them --decode--> Clip --tell--> text, picture, text, ...
```

The times of all frames are read before any is decoded, so that the limits of data.video, and of pixels, hold for what
is not decoded yet. PyAV, which brings FFmpeg's libraries, is the extra `video`; without it only drawn clips are read.

A file is a stranger's. Only containers of CONTAINERS are opened, told by how they begin: others of FFmpeg's, such as
playlists, open files and addresses that they name. Only decoders of CODECS run.
"""

import dataclasses
import importlib
import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nanovlm.config import TilingConfig, VideoConfig, VLMConfig, pick
from nanovlm.errors import UserError

# How containers begin, from a byte on, and FFmpeg's name of them.
CONTAINERS = {(4, b"ftyp"): "mp4", (0, b"\x1a\x45\xdf\xa3"): "matroska", (0, b"GIF8"): "gif"}
# How the names of files end, whose pictures are tar members, too; of what is written by FFmpeg's names.
SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv")
SUFFIX_OF = {"mp4": "mp4", "matroska": "webm"}
CODECS = ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "gif")
MOST_FRAMES = 2_000_000  # of which a file may tell the times
SKIPPED = 1.0  # seconds at both ends of a long video, of which no frame is shown
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
)
ONES = (ONES + "eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


class Clip(NamedTuple):
    """Frames of a video, their times and the length of the video in seconds."""

    images: list[Image.Image]
    times: list[float]
    duration: float
    # Width and height of the first frame in the file, which may have been shrunk.
    size: tuple[int, int] = (0, 0)

    def part(self) -> dict:
        """Return the part of a message that shows the clip, whose frames are among the images of the conversation."""
        return {"type": "video", "times": self.times, "duration": self.duration}


class Index(NamedTuple):
    """When the frames of a video are shown, in units of `unit` seconds, and at which of them decoding can begin."""

    times: list[int]
    # Frames in the file, with those that it says are not to be shown, as of a video that was trimmed.
    num_stored: int
    keys: list[int]
    unit: float
    # From the first frame to the end of the last, in seconds.
    duration: float


# --- reading -------------------------------------------------------------------------------------------------


def open_video(path: str | Path, config: VideoConfig, side: int | None = None) -> Clip:
    """Read frames of a video file, as decode_video. Raises UserError that names it when it is missing or no video."""
    if not Path(path).is_file():
        raise UserError(f"there is no video file {path}")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return decode_video(data, str(path), config, side)


def decode_video(data: bytes, name: str, config: VideoConfig, side: int | None = None) -> Clip:
    """Read the frames that `choose` chooses of a video file's bytes, RGB and upright, no longer than `side` pixels.

    Raises UserError that begins with `name`, and where the data are from if they know it, for data that are no video,
    are cut off, or exceed a limit.
    """
    if isinstance(origin := getattr(data, "name", None), str):
        name = f"{name} ({origin})"
    av = needed()
    kind = find_container(data)
    if kind is None:
        raise UserError(f"{name} cannot be read as a video: its {len(data)} bytes are no mp4, webm or gif")
    try:
        with _open(av, data, kind) as container:
            index, chosen = _survey(container, config, side)
        with _open(av, data, kind) as container:
            wanted, keys = [index.times[i] for i in chosen], index.keys if kind != "gif" else []
            images, size = _read_frames(container, wanted, keys, side)
        return Clip(images, [(index.times[i] - index.times[0]) * index.unit for i in chosen], index.duration, size)
    except Exception as error:  # on damaged files, decoders raise anything
        raise UserError(f"{name} cannot be read as a video: {error or type(error).__name__}") from error


def find_container(data: bytes) -> str | None:
    """Return FFmpeg's name of the container that a file is, None if it is none of CONTAINERS."""
    return next((kind for (at, head), kind in CONTAINERS.items() if data[at : at + len(head)] == head), None)


def needed() -> Any:
    """Import what the extra `video` installs. Raises UserError that says how."""
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise UserError('videos need the package av: pip install -e ".[video]"') from None
    av.logging.set_level(None)  # what is wrong with a file is raised
    return av


def _open(av, data: bytes, kind: str):
    return av.open(io.BytesIO(data), format=kind, options={"codec_whitelist": ",".join(CODECS)})


def _survey(container, config: VideoConfig, side: int | None) -> tuple[Index, list[int]]:
    """Return when the frames of a video are shown, and those to show; raise UserError for what exceeds a limit."""
    if not container.streams.video:
        raise UserError("it has no pictures, or is cut off before what describes them")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec.name not in CODECS:
        raise UserError(f"its pictures are of the codec {codec.name}; what is read is {', '.join(CODECS)}")
    told = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    _check_length(told, config)
    most = most_pixels()
    if codec.width * codec.height > most:
        raise UserError(f"it has frames of {codec.width} x {codec.height} pixels, more than data.max_pixels = {most}")
    # Of a trimmed mp4, FFmpeg reads those frames alone that its edit list needs.
    told_frames = len(stream.index_entries) if "mp4" in container.format.name else stream.frames
    index = read_index(container, stream, config)
    if index.num_stored < told_frames:
        raise UserError(f"it is cut off: it has {index.num_stored} of its {told_frames} frames")
    if len(container.streams) == 1 and index.duration < 0.9 * told - 1:
        raise UserError(f"it is cut off: it has {index.duration:.1f} of its {told:.1f} seconds")
    chosen = choose(len(index.times), index.duration, config)
    if (pixels := len(chosen) * _count_pixels(codec, side)) > most:
        raise UserError(f"{len(chosen)} of its frames have {pixels} pixels, more than data.max_pixels = {most}")
    return index, chosen


def most_pixels() -> int:
    """Return data.max_pixels, which is PIL's limit, where None is none; FFmpeg's own largest number of pixels, then."""
    return 2**31 - 1 if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS


def _count_pixels(frame, side: int | None) -> int:
    """Return how many pixels at most are kept of a frame."""
    return frame.width * frame.height if side is None else min(frame.width * frame.height, side**2)


def _read_frames(
    container, wanted: Sequence[int], keys: Sequence[int], side: int | None
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Return the frames that are shown at these times, which ascend, upright, and the size of the first in the file."""
    stream = container.streams.video[0]
    stream.codec_context.options = {"max_pixels": str(most_pixels())}  # frames may say another size
    stream.codec_context.thread_count = 1
    images, size, most = [], (0, 0), most_pixels()
    for frame in _decode(container, stream, wanted, keys):
        most -= _count_pixels(frame, side)  # which may grow along the stream
        if most < 0:
            raise UserError(f"its frames have more pixels than data.max_pixels = {Image.MAX_IMAGE_PIXELS}")
        image = _upright(frame)
        size = size if images else image.size
        if side is not None:
            image.thumbnail((side, side), Image.Resampling.BOX)
        images.append(image)
    if len(images) < len(wanted):
        raise UserError(f"it is cut off: {len(images)} of the {len(wanted)} frames to show were found")
    return images, size


def read_index(container, stream, config: VideoConfig) -> Index:
    """Read the times of all frames, in the order in which they are shown, and decode none."""
    times, keys, end, unit, num_stored = set(), set(), 0, float(stream.time_base), 0
    for packet in container.demux(stream):
        if packet.pts is None or packet.size == 0:
            continue
        num_stored += 1
        if packet.is_keyframe:
            keys.add(packet.pts)
        if not packet.is_discard:  # else decoders need it, and give no frame for it
            times.add(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
        if num_stored > MOST_FRAMES:
            raise UserError(f"it has more than {MOST_FRAMES} frames")
    if not times:
        raise UserError("it has no frames")
    ordered = sorted(times)
    if len(ordered) > 1 and end <= ordered[-1]:  # the last frame does not say how long it is
        end = ordered[-1] + ordered[-1] - ordered[-2]
    duration = max(end - ordered[0], 0) * unit
    _check_length(duration, config)
    return Index(ordered, num_stored, sorted(keys), unit, duration)


def _check_length(seconds: float, config: VideoConfig):
    if seconds > config.max_seconds:
        raise UserError(f"it is {seconds:.0f} s long, more than data.video.max_seconds = {config.max_seconds:g}")


def choose(num_frames: int, duration: float, config: VideoConfig) -> list[int]:
    """Choose frames evenly, `fps` a second and at most config.num_frames, as SmolVLM2's processor does.

    Of a video that is longer than twice SKIPPED by more than num_frames x fps seconds, both ends are left out.
    """
    wanted = min(round(config.fps * duration), config.num_frames) if config.fps else config.num_frames
    first, last = 0, num_frames - 1
    rate = round(num_frames / duration, 6) if duration else 0  # else 30 could be a little less than 30
    if duration - 2 * SKIPPED > config.num_frames * config.fps:
        first, last = int(SKIPPED * rate), min(int(num_frames - SKIPPED * rate), last)
    if first >= last:
        first, last = 0, num_frames - 1
    return np.unique(np.linspace(first, last, max(wanted, 1), dtype=int)).tolist()


def _decode(container, stream, wanted: Sequence[int], keys: Sequence[int]) -> Iterator[Any]:
    """Yield the frame that is shown at each time of `wanted`, which ascend; with `keys`, skip what is between them."""
    frames, now, frame = container.decode(stream), -1, None
    for time in wanted:
        place = bisect_right(keys, time)
        if place and keys[place - 1] > now:
            container.seek(keys[place - 1], stream=stream)
            frames, frame = container.decode(stream), None
        while frame is None or now < time:
            frame = next(frames, None)
            if frame is None:
                return
            now = now + 1 if frame.pts is None else frame.pts
        yield frame


def _upright(frame) -> Image.Image:
    """Return a decoded frame as a picture, turned as the file says it is to be shown."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


# --- as text -------------------------------------------------------------------------------------------------


def shows_video(messages: Sequence[dict]) -> bool:
    """Return whether a message has a part of a clip."""
    contents = [message["content"] for message in messages]
    return any(part["type"] == "video" for content in contents if isinstance(content, list) for part in content)


def tell(messages: Sequence[dict], prompt: str) -> list[dict]:
    """Write parts of clips as text and image parts, in the way that `prompt`, a key of PROMPTS, names."""
    return [
        {**message, "content": _tell_parts(message["content"], prompt)}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _tell_parts(parts: list[dict], prompt: str) -> list[dict]:
    told: list[dict] = []

    def add(text):
        """Add text in one piece with the text before it, as tokens may reach over both."""
        if told and told[-1]["type"] == "text":
            told[-1] = {"type": "text", "text": told[-1]["text"] + text}
        elif text:
            told.append({"type": "text", "text": text})

    for part in parts:
        if part["type"] == "text":
            add(part["text"])
        elif part["type"] == "video":
            before, after = pick(PROMPTS, prompt, "model.video_prompt")(part["times"], part["duration"])
            for text in before:
                add(text)
                told.append({"type": "image"})
            add(after)
        else:
            told.append(part)
    return told


def tell_smolvlm(times: Sequence[float], duration: float) -> tuple[list[str], str]:
    """Return what SmolVLM2's processor writes before each frame, and after the last."""
    before = [f"\nFrame from {int(time // 60):02}:{int(time % 60):02}:" for time in times]
    length = timedelta(seconds=int(duration))
    before[0] = (
        f"You are provided the following series of {number_words(len(times))} frames from a {length} [H:MM:SS] video.\n"
        + before[0]
    )
    return before, "\n\n"


def tell_times(times: Sequence[float], duration: float) -> tuple[list[str], str]:
    return [f"{time:.1f}s:" for time in times], "\n"


PROMPTS: dict[str, Callable[[Sequence[float], float], tuple[list[str], str]]] = {
    "smolvlm": tell_smolvlm,
    "times": tell_times,
}


def number_words(number: int) -> str:
    """Write a number from 0 to 999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    rest = f" and {number_words(number % 100)}" if number % 100 else ""
    return f"{ONES[number // 100]} hundred{rest}"


def frame_tiling(config: VLMConfig) -> TilingConfig:
    """Return the tiling by which a frame has as few tiles as the policy can make, one of most."""
    policy, side = config.tiling.policy, config.tile_size
    if policy in ("fit", "internvl"):
        return dataclasses.replace(config.tiling, max_tiles=1)
    if policy in ("idefics3", "nanovlm", "anyres"):
        return dataclasses.replace(config.tiling, longest_edge=side)
    return config.tiling
