"""Cuts and standing pictures: the figures of FFmpeg's own filters."""

import itertools
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from nanovlm.config import VideoConfig
from nanovlm.data import shots
from nanovlm.data.shots import find_cuts, find_still, scene_scores, still_share
from nanovlm.data.video import Clip, open_video

RATE = 5


def make_clip():
    """Three shots: 4 s that stand still, 4 s of a moving square, and 3 s of another still picture, with one flash."""
    rng = np.random.default_rng(0)
    first, last = (rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(2))
    frames = [first] * (4 * RATE)
    for step in range(4 * RATE):
        moving = np.full((48, 64, 3), 90, np.uint8)
        moving[10:30, 2 * step : 2 * step + 16] = 200
        frames.append(moving)
    frames += [last] * (3 * RATE)
    frames[-2] = 255 - last
    images = [Image.fromarray(frame) for frame in frames]
    return Clip(images, [i / RATE for i in range(len(images))], len(images) / RATE)


def run_filter(clip, chain):
    """Return the frames that come out of a chain of FFmpeg's filters, with what it noted about each."""
    av = pytest.importorskip("av", reason="needs av, the extra video")
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=64, height=48, format="rgb24", time_base="1/5")]
    nodes += [graph.add(*one) for one in chain] + [graph.add("buffersink")]
    for a, b in itertools.pairwise(nodes):
        a.link_to(b)
    graph.configure()
    found = []

    def pull():
        while True:
            try:
                found.append(graph.pull())
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for number, image in enumerate(clip.images):
        frame = av.VideoFrame.from_image(image)
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        graph.push(frame)
        pull()
    graph.push(None)
    pull()
    return found


def test_scene_scores_and_cuts_are_those_of_select():
    clip = make_clip()
    for least in (0.02, 0.4, 0.7, 0.9):
        shown = [frame.pts for frame in run_filter(clip, [("select", f"gt(scene,{least})")])]
        assert [round(time * RATE) for time in find_cuts(clip, least)] == shown and shown
    theirs = [float(x.metadata["lavfi.scene_score"]) for x in run_filter(clip, [("select", "gte(scene,0)")])]
    assert scene_scores(clip.images) == pytest.approx(theirs, abs=2e-6)
    assert len({round(score, 3) for score in theirs}) > 3


@pytest.mark.parametrize(("noise", "seconds"), [(0.001, 2.0), (0.05, 1.0), (0.001, 3.5)])
def test_standing_pictures_are_those_of_freezedetect(noise, seconds):
    clip = make_clip()
    starts, ends = [], []
    for frame in run_filter(clip, [("freezedetect", f"n={noise}:d={seconds}")]):
        told = {key.rpartition(".")[2]: float(value) for key, value in frame.metadata.items() if "freezedetect" in key}
        starts += [told["freeze_start"]] if "freeze_start" in told else []
        ends += [told["freeze_end"]] if "freeze_end" in told else []
    ends += [clip.duration] if len(ends) < len(starts) else []  # it is not told at the end
    found = find_still(clip, noise, seconds)
    assert [start for start, _ in found] == pytest.approx(starts) and [end for _, end in found] == pytest.approx(ends)
    assert found and still_share(clip, noise, seconds) == pytest.approx(
        sum(end - start for start, end in found) / clip.duration
    )


def test_one_frame_and_large_ones():
    one = Clip([Image.new("RGB", (2000, 10))], [0.0], 3.0)
    assert find_cuts(one) == [] and find_still(one) == [(0.0, 3.0)] and still_share(one) == 1.0
    assert still_share(Clip(one.images, [0.0], 0.0)) == 0.0


def test_a_clip_that_begins_later_ends_with_its_video():
    """As of a long video, whose ends are left out: its first frame is that of 1 s."""
    black = Image.new("RGB", (8, 8))
    clip = Clip([black] * 9, [float(i) for i in range(1, 10)], 11.0)
    assert find_still(clip) == [(1.0, 11.0)] and still_share(clip) == 1.0
    moving = Clip([*[black] * 6, *(Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(1, 4))], *clip[1:3])
    assert find_still(moving) == [(1.0, 7.0), (9.0, 11.0)] and still_share(moving) == pytest.approx(0.8)


def test_frames_of_another_size_are_another_shot():
    clip = Clip([Image.new("RGB", (8, 8))] * 3 + [Image.new("RGB", (16, 8))] * 3, [float(i) for i in range(6)], 6.0)
    assert find_cuts(clip) == [3.0] and find_still(clip) == [(0.0, 3.0), (3.0, 6.0)]


def test_only_small_frames_are_kept(tmp_path, monkeypatch):
    """So that the limit of pixels is none of the length: as many frames as are looked at are seldom below it."""
    pytest.importorskip("av", reason="needs av, the extra video")
    path = tmp_path / "large.gif"
    frames = [Image.new("RGB", (640, 480), (0, 25 * i, 0)) for i in range(10)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, loop=0)
    config = VideoConfig(num_frames=10, fps=5)
    assert open_video(path, config, side=128).size == (640, 480)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700 * 500)
    told = shots.describe(path, config)
    assert (told["width"], told["height"], told["frames"]) == (640, 480, 10)


def test_files_are_described_and_broken_ones_counted(tmp_path, capsys, monkeypatch):
    pytest.importorskip("av", reason="needs av, the extra video")
    clip, path = make_clip(), tmp_path / "three.gif"
    clip.images[0].save(path, save_all=True, append_images=clip.images[1:], duration=200, loop=0)
    (tmp_path / "broken.mp4").write_text("nothing")
    shots.main((path, tmp_path / "broken.mp4"))
    out = capsys.readouterr()
    assert "three.gif: 11.0 s of 64 x 48, " in out.out and "2 videos, 1 of them broken" in out.out
    assert "broken.mp4 cannot be read as a video: its 7 bytes are no mp4, webm or gif" in out.err
    monkeypatch.setattr(sys, "argv", ["shots", "--help"])
    monkeypatch.delitem(sys.modules, "nanovlm.data.shots")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("nanovlm.data.shots", run_name="__main__")
    assert ended.value.code == 0 and "--num-frames" in capsys.readouterr().out
