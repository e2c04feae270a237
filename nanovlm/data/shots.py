"""Frames of a video -> how much of it stands still, and where it is cut.

Both are FFmpeg's measures, so that limits which others found hold here: `scene` of its filter select, and freezedetect.

    python -m nanovlm.data.shots videos/*.mp4         a line for each: its length, size, cuts and what stands still
    python -m nanovlm.data.shots videos/*.mp4 --json-lines
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nanovlm import cli
from nanovlm.config import VideoConfig
from nanovlm.data.video import Clip, open_video
from nanovlm.errors import UserError, printable

SIDE = 128  # pixels of the longer side at which frames are compared
CUT = 0.4  # scene score from which two neighbours are of different shots
NOISE = 0.001  # mean difference, as a share of the largest, up to which a picture stands still; freezedetect's -60 dB
STILL_SECONDS = 2.0  # how long it has to


def scene_scores(images: Sequence[Image.Image]) -> np.ndarray:
    """Return how new each frame is, float64[n] from 0 to 1: the first is 0.

    The mean difference d of a frame and the one before, in levels of 256, or its change since the last difference if
    that is less: min(d, |d - d before|) / 100, at most 1. So steady motion has low scores, and a cut has one high one.
    """
    small = [_shrink(image) for image in images]
    pairs = itertools.pairwise(small)
    apart = np.array([0.0, *(_differ(a, b) / 100 for a, b in pairs)])
    return np.minimum(apart, np.abs(apart - np.concatenate(([0.0], apart[:-1])))).clip(0, 1)


def find_cuts(clip: Clip, least: float = CUT) -> list[float]:
    """Return the times of the frames that begin a new shot."""
    return [time for time, score in zip(clip.times, scene_scores(clip.images), strict=True) if score > least]


def find_still(clip: Clip, noise: float = NOISE, seconds: float = STILL_SECONDS) -> list[tuple[float, float]]:
    """Return when the picture stands still: from a frame to the first that differs from it by more than `noise`."""
    small, found, start = [_shrink(image) for image in clip.images], [], 0
    for number in range(1, len(small) + 1):
        is_end = number == len(small)
        if is_end or _differ(small[number], small[start]) / 256 > noise:
            end = clip.duration if is_end else clip.times[number]
            if end - clip.times[start] >= seconds:
                found.append((clip.times[start], end))
            start = number
    return found


def still_share(clip: Clip, noise: float = NOISE, seconds: float = STILL_SECONDS) -> float:
    """Return the share of a clip in which the picture stands still."""
    whole = clip.duration - clip.times[0] if clip.times else 0
    return min(sum(end - start for start, end in find_still(clip, noise, seconds)) / whole, 1.0) if whole > 0 else 0.0


def _differ(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean difference of two frames; it is the largest of those of different sizes, as of joined videos."""
    return float(np.abs(a - b).mean()) if a.shape == b.shape else 256.0


def _shrink(image: Image.Image) -> np.ndarray:
    """Return the pixels of a frame at SIDE at most, float64[H, W, C]."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def describe(path: Path, config: VideoConfig) -> dict:
    """Say how long a video is and how large, how many cuts it has, and how much of it stands still."""
    clip = open_video(path, config, side=SIDE)
    return {
        "file": str(path),
        "seconds": round(clip.duration, 3),
        "width": clip.size[0],
        "height": clip.size[1],
        "frames": len(clip.images),
        "cuts": [round(time, 3) for time in find_cuts(clip)],
        "still": round(still_share(clip), 4),
    }


def main(
    files: tuple[Path, ...],
    num_frames: int = 600,
    fps: float = 5.0,
    max_seconds: float = 3600.0,
    json_lines: bool = False,
):
    """Print what each video is like; broken ones are named and counted.

    Args:
        files: Video files.
        num_frames: At most so many frames of each are looked at.
        fps: How many frames a second are looked at, where these are fewer.
        max_seconds: Longest video that is read.
        json_lines: Print one JSON object for each.
    """
    config, broken = VideoConfig(num_frames, fps, max_seconds), 0
    config.validate("--")
    for path in tqdm(files, unit="video", delay=2):
        try:
            told = describe(path, config)
        except UserError as error:
            broken += 1
            tqdm.write(printable(str(error)), file=sys.stderr)
            continue
        if json_lines:
            tqdm.write(json.dumps(told))
        else:
            tqdm.write(
                f"{printable(told['file'])}: {told['seconds']:.1f} s of {told['width']} x {told['height']}, "
                f"{len(told['cuts'])} cuts, {100 * told['still']:.0f} % stands still"
            )
    print(f"{len(files)} videos, {broken} of them broken", file=sys.stderr if json_lines else sys.stdout)


if __name__ == "__main__":
    import tyro

    cli.run(lambda: tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,)))
