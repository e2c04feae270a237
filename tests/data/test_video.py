"""Videos as frames: which are shown, how they are written, what is refused, and what of a broken file is counted."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config import DataConfig, TilingConfig, VideoConfig
from nanovlm.data import video
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens, plan_tiles
from nanovlm.data.loader import Loader
from nanovlm.data.process import make_process
from nanovlm.data.records import to_sample
from nanovlm.data.sources import open_source
from nanovlm.data.split import digests
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.data.types import Sample
from nanovlm.data.video import Clip, choose, decode_video, number_words, open_video, tell
from nanovlm.errors import UserError
from tests.conftest import TINY, noise
from tests.data.chat_templates import SMOLVLM

QUESTION = {"type": "text", "text": "what happens?"}
MANY = VideoConfig(num_frames=7, fps=0)


def make_video(num, rate, codec, container, size=(32, 24), sound=False, **options):
    """Encode a video in which a bright bar grows from the left, frame by frame."""
    av = pytest.importorskip("av", reason="needs av, the extra video")
    file, (width, height) = io.BytesIO(), size
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.options = options
        if sound:
            audio = out.add_stream("aac", rate=16000, layout="mono")
        for number in range(num):
            pixels = np.full((height, width, 3), 16 + number, np.uint8)
            pixels[:, : number * width // num] = 235
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            out.mux(audio.encode(frame))
            out.mux(audio.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def mp4():
    """Five seconds, with a key frame a second and frames that are stored in another order than shown."""
    return make_video(50, 10, "mpeg4", "mp4", g="10", bf="2")


@pytest.fixture(scope="module")
def smolvlm():
    """A processor with SmolVLM's template, markers and tiling, which cuts pictures into 16 tiles."""
    config = dataclasses.replace(TINY, tiling=TilingConfig("idefics3", longest_edge=64))
    texts = [
        "You are provided the following series of frames from a [H:MM:SS] video. Frame from 00:01: what happens?\n\n"
    ]
    tokenizer = train_tokenizer(texts * 9, 470, [*marker_tokens(config), "<|im_start|>"])
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.get_vocab_size())
    return Processor(tokenizer, SMOLVLM, dataclasses.replace(config, decoder=decoder))


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("mpeg4", "mp4", {"g": "10", "bf": "2"}),
        ("libx264", "mp4", {"g": "12", "bf": "2", "preset": "ultrafast"}),
        ("libx264", "matroska", {"g": "12", "preset": "ultrafast"}),
        ("libvpx", "webm", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
        ("gif", "gif", {}),
    ],
)
def test_frames_are_those_of_the_whole_video_decoded(codec, container, options):
    """With sought key frames as without, also the last frame; each at its time."""
    av = pytest.importorskip("av", reason="needs av, the extra video")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    data = make_video(50, 10, codec, container, **options)
    with av.open(io.BytesIO(data)) as opened:
        every = [np.asarray(frame.to_image()) for frame in opened.decode(video=0)]
    assert len(every) == 50 and len({frame.tobytes() for frame in every}) > 25
    for config in (MANY, VideoConfig(num_frames=999, fps=1), VideoConfig(num_frames=50, fps=10)):
        clip = decode_video(data, "the clip", config)
        chosen = choose(50, 5.0, config)
        assert clip.duration == pytest.approx(5, abs=0.11)
        assert clip.times == pytest.approx([i / 10 for i in chosen], abs=0.002)
        assert all(np.array_equal(image, every[i]) for image, i in zip(clip.images, chosen, strict=True))
    assert chosen == list(range(50))  # all of them


def test_choosing_is_that_of_smolvlm():
    """Cases of transformers' SmolVLMVideoProcessor.sample_frames 5.23: frames, rate, most frames, frames a second."""
    for case, theirs in {
        (1, 10, 8, 1): [0],
        (50, 10, 8, 1): [0, 12, 24, 36, 49],
        (50, 10, 3, 1): [0, 24, 49],
        (300, 30, 4, 1): [30, 110, 190, 270],
        (2360, 30, 16, 2): [30, 183, 336, 490, 643, 796, 950, 1103, 1256, 1410, 1563, 1716, 1870, 2023, 2176, 2330],
        (9, 2, 64, 4): [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8],
    }.items():
        num, rate, most, fps = case
        assert choose(num, num / rate, VideoConfig(most, fps)) == sorted(set(theirs)), case
    assert choose(90, 3.0, VideoConfig(4, 0)) == [30, 40, 50, 60]  # by number alone, both ends left out
    assert choose(40, 1.6, VideoConfig(3, 0)) == [0, 19, 39]


def transformers_smolvlm(processor):
    """Return transformers' SmolVLMProcessor of the same tokenizer and tile size; skip where it cannot be made."""
    pytest.importorskip("transformers")
    pytest.importorskip("num2words", reason="needs num2words, which transformers' SmolVLMProcessor imports")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision, which transformers' SmolVLMProcessor imports")
    for name in ("nms", "qnms"):  # torchvision's wheels for CUDA lack them beside a torch for CPUs
        with contextlib.suppress(RuntimeError):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import PreTrainedTokenizerFast
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    side = {"longest_edge": processor.config.tile_size}
    copy = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<end_of_utterance>", pad_token="<|pad|>")
    return SmolVLMProcessor(
        SmolVLMImageProcessor(),
        tokenizer,
        SmolVLMVideoProcessor(size=side, max_image_size=side),
        image_seq_len=processor.config.num_image_tokens,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def test_tokens_frames_and_pixels_are_those_of_smolvlms_processor(smolvlm):
    theirs = transformers_smolvlm(smolvlm)
    from transformers.video_utils import VideoMetadata

    rng = random.Random(0)
    for num_frames, rate, config in ((90, 10, VideoConfig(5, 1)), (4000, 30, VideoConfig(24, 0.2))):
        asked = [{"role": "user", "content": [{"type": "video"}, QUESTION]}]
        chosen = choose(num_frames, num_frames / rate, config)
        images = [noise(rng.randrange(1000), 40).resize((40, 24)) for _ in chosen]
        told = VideoMetadata(total_num_frames=num_frames, fps=rate, duration=num_frames / rate)
        sample = theirs.video_processor.sample_frames
        assert sample(told, num_frames=config.num_frames, fps=config.fps).tolist() == chosen
        told.frames_indices = chosen
        text = theirs.apply_chat_template(asked, add_generation_prompt=True)
        frames = np.stack([np.asarray(image) for image in images])
        out = theirs(text=[text], videos=[frames], video_metadata=[told], do_sample_frames=False, return_tensors="pt")
        clip = Clip(images, [i / rate for i in chosen], num_frames / rate)
        ours = smolvlm.prompt([{"role": "user", "content": [clip.part(), QUESTION]}], images)
        assert ours.input_ids.tolist() == out["input_ids"][0].tolist()
        pixels = (out["pixel_values"][0] * 0.5 + 0.5) * 255
        assert ours.tiles.shape == pixels.shape and (ours.tiles - pixels).abs().max() < 2.01
        assert (ours.tiles - pixels).abs().mean() < 0.05  # torch's filter and PIL's round differently
    for _ in range(200):
        num, rate = rng.randint(1, 4000), rng.choice([1, 5, 10, 24, 25, 29.97, 30, 60])
        config = VideoConfig(rng.choice([1, 2, 8, 64]), rng.choice([0.5, 1, 4]))
        told = VideoMetadata(total_num_frames=num, fps=rate, duration=num / rate)
        assert choose(num, num / rate, config) == sample(told, num_frames=config.num_frames, fps=config.fps).tolist()


def test_a_video_is_written_as_smolvlm_writes_it(smolvlm):
    """As its processor of transformers 5.23 does, also where that cannot be run; a frame has one tile."""
    clip = Clip([noise(i, 40) for i in range(21)], [0.0, 61.9, *range(3581, 3600)], 3725.9)
    prompt = smolvlm.prompt([{"role": "user", "content": [clip.part(), QUESTION]}], clip.images)
    frame = "<fake_token_around_image><global-img>" + "<image>" * TINY.num_image_tokens + "<fake_token_around_image>"
    times = ["00:00", "01:01", *(f"59:{second:02}" for second in range(41, 60))]
    assert smolvlm.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False) == (
        "<|im_start|>User: You are provided the following series of twenty-one frames from a 1:02:05 [H:MM:SS] video.\n"
        + "".join(f"\nFrame from {time}:{frame}" for time in times)
        + "\n\nwhat happens?<end_of_utterance>\nAssistant:"
    )
    assert len(prompt.tiles) == 21
    picture = smolvlm.prompt([{"role": "user", "content": [{"type": "image"}, QUESTION]}], clip.images[:1])
    assert len(picture.tiles) == 17  # the same as a picture


def test_numbers_are_written_as_words():
    spelled = ["zero", "seven", "twelve", "twenty", "ninety-nine", "one hundred", "six hundred and forty-one"]
    assert [number_words(number) for number in (0, 7, 12, 20, 99, 100, 641)] == spelled
    num2words = pytest.importorskip("num2words", reason="needs num2words").num2words
    assert [number_words(number) for number in range(1000)] == [num2words(number) for number in range(1000)]


@pytest.mark.parametrize(
    ("policy", "tiles"), [("fit", 10), ("idefics3", 13), ("nanovlm", 13), ("square", 1), ("internvl", 7)]
)
def test_frames_have_few_tiles_whatever_the_tiling(policy, tiles):
    config = dataclasses.replace(TINY, tiling=TilingConfig(policy, max_tiles=9, longest_edge=64))
    frames = dataclasses.replace(config, tiling=video.frame_tiling(config))
    assert plan_tiles(64, 48, frames).num_tiles == 1
    assert plan_tiles(64, 48, config).num_tiles == tiles


def test_parts_of_a_message_become_one_text():
    """Words before and after a clip are in one piece with what is written around its frames."""
    part = Clip([], [0.0, 1.25], 2.5).part()
    content = [{"type": "text", "text": "See:"}, part, {"type": "text", "text": "and"}, part, QUESTION]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    texts = ["See:0.0s:", "1.2s:", "\nand0.0s:", "1.2s:", "\nwhat happens?"]
    parts = [{"type": "text", "text": text} for text in texts]
    image = {"type": "image"}
    told = [parts[0], image, parts[1], image, parts[2], image, parts[3], image, parts[4]]
    assert tell(said, "times") == [said[0], {"role": "user", "content": told}]
    with pytest.raises(ValueError, match=r"model.video_prompt = 'none' is unknown; there are smolvlm, times"):
        tell(said, "none")


def test_a_frame_is_turned_upright(mp4):
    """A phone stores how it was held as a matrix in the header of the track: here 90 degrees clockwise."""
    at = mp4.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", mp4[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 24 << 16, 0, 1 << 30)
    data = mp4[:at] + struct.pack(">9i", *turned) + mp4[at + 36 :]
    plain, upright = (decode_video(x, "the clip", MANY).images[3] for x in (mp4, data))
    assert (plain.size, upright.size) == ((32, 24), (24, 32))
    assert np.array_equal(upright, np.rot90(np.asarray(plain), -1))  # the bar grows from above


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.5), (1.5, 5.0), (1.5, 3.0)])
def test_of_a_trimmed_video_the_rest_is_shown(mp4, start, end):
    """Phones trim by the edit list: which part of the track is shown, the frames of the rest are still in the file."""
    av = pytest.importorskip("av", reason="needs av, the extra video")
    at = mp4.index(b"elst") + 12
    length, first, _rate = struct.unpack(">iii", mp4[at : at + 12])
    with av.open(io.BytesIO(mp4)) as opened:
        ticks = round(start / opened.streams.video[0].time_base)
    trimmed = mp4[:at] + struct.pack(">ii", round(length * (end - start) / 5), first + ticks) + mp4[at + 8 :]
    whole, rest = (decode_video(x, "the clip", VideoConfig(50, 10)) for x in (mp4, trimmed))
    assert rest.duration == pytest.approx(end - start, abs=0.11)
    shown = [i for i, time in enumerate(whole.times) if start - 1e-6 <= time < end - 1e-6]
    assert rest.times == pytest.approx([whole.times[i] - start for i in shown], abs=0.01)
    assert all(np.array_equal(image, whole.images[i]) for image, i in zip(rest.images, shown, strict=True))


# --- what is refused -----------------------------------------------------------------------------------------


def test_limits_hold_before_a_frame_is_decoded(mp4, monkeypatch):
    monkeypatch.setattr(video, "_read_frames", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(UserError, match=r"^the clip .*: it is 5 s long, more than data.video.max_seconds = 4$"):
        decode_video(mp4, "the clip", VideoConfig(max_seconds=4))
    monkeypatch.setattr(video, "MOST_FRAMES", 30)
    with pytest.raises(UserError, match="it has more than 30 frames"):
        decode_video(mp4, "the clip", MANY)
    monkeypatch.setattr(video, "MOST_FRAMES", 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 24 * 7 - 1)
    with pytest.raises(UserError, match=r"7 of its frames have 5376 pixels, more than data.max_pixels = 5375"):
        decode_video(mp4, "the clip", MANY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 24 - 1)
    with pytest.raises(UserError, match=r"it has frames of 32 x 24 pixels, more than data.max_pixels = 767"):
        decode_video(mp4, "the clip", MANY)


def test_without_a_limit_of_pils_there_is_none(mp4, monkeypatch):
    """A program that uses this package may have set it."""
    before = decode_video(mp4, "the clip", MANY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert [x.tobytes() for x in decode_video(mp4, "the clip", MANY).images] == [x.tobytes() for x in before.images]


def test_frames_that_are_larger_than_the_file_says_are_not_decoded(monkeypatch):
    """The limit is the decoder's own, too, as a stream may say another size than its container."""
    data = make_video(5, 10, "mpeg4", "mp4", size=(64, 48))
    survey = video._survey

    def lying(container, config, side):
        with monkeypatch.context() as change:
            change.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
            return survey(container, config, side)

    monkeypatch.setattr(video, "_survey", lying)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(UserError, match=r"^the clip cannot be read as a video: .*avcodec_open2"):
        decode_video(data, "the clip", MANY)


def test_frames_that_grow_along_a_video_are_counted_as_they_come(monkeypatch):
    """The header of the file tells the size of the first."""
    av = pytest.importorskip("av", reason="needs av, the extra video")
    if "libvpx" not in av.codecs_available:
        pytest.skip("this build of FFmpeg has no libvpx")
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as out:
        stream = out.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number, side in enumerate((32, 32, 96, 96)):
            codec = av.CodecContext.create("libvpx", "w")
            codec.width = codec.height = side
            codec.pix_fmt, codec.time_base = "yuv420p", Fraction(1, 10)
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), 50, np.uint8), format="rgb24")
            frame.pts = number
            for packet in [*codec.encode(frame), *codec.encode()]:
                packet.stream, packet.time_base = stream, Fraction(1, 10)
                out.mux(packet)
    sizes = [image.size for image in decode_video(file.getvalue(), "the clip", MANY).images]
    assert sizes == [(32, 32)] * 2 + [(96, 96)] * 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 128)
    with pytest.raises(UserError, match=r"its frames have more pixels than data\.max_pixels = 16384"):
        decode_video(file.getvalue(), "the clip", MANY)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"",
        b"RIFF\0\0\0\0AVI LIST",
    ],
)
def test_playlists_and_other_containers_are_not_opened(data):
    pytest.importorskip("av", reason="needs av, the extra video")
    with pytest.raises(UserError, match=rf"^the clip .*: its {len(data)} bytes are no mp4, webm or gif$"):
        decode_video(data, "the clip", MANY)


def test_broken_files_are_named(mp4, tmp_path):
    webm = make_video(60, 10, "mpeg4", "matroska", g="10")
    for data in (mp4[:60], mp4[: len(mp4) // 2], webm[: len(webm) // 2], webm[:30], b"GIF89a" + bytes(50)):
        with pytest.raises(UserError, match=r"^the clip cannot be read as a video: "):
            decode_video(data, "the clip", MANY)
    with pytest.raises(UserError, match=r"the codec mjpeg; what is read is h264"):
        decode_video(make_video(3, 10, "mjpeg", "matroska", color_range="2", strict="-1"), "the clip", MANY)
    rng = random.Random(0)
    for _ in range(60):  # whatever is damaged gives frames or a sentence
        damaged = bytearray(rng.choice((mp4, webm)))
        for _ in range(rng.randint(1, 30)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decode_video(bytes(damaged), "the clip", MANY).images
        except UserError as error:
            assert str(error).startswith("the clip cannot be read as a video: ")
    with pytest.raises(UserError, match=r"there is no video file .*none.mp4"):
        open_video(tmp_path / "none.mp4", MANY)


def test_sound_is_passed_over():
    data = make_video(10, 10, "mpeg4", "mp4", sound=True)
    assert len(decode_video(data, "the clip", MANY).images) == 7


def test_without_the_package_a_sentence_says_how(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r'videos need the package av: pip install -e "\.\[video\]"'):
        decode_video(b"GIF89a", "the clip", MANY)


# --- in records ----------------------------------------------------------------------------------------------


def test_records_with_videos_are_read_and_broken_ones_counted(mp4, smolvlm, tmp_path):
    (tmp_path / "elsewhere.mp4").write_bytes(mp4)
    tmp_path = tmp_path / "records"
    tmp_path.mkdir()
    (tmp_path / "good.mp4").write_bytes(mp4)
    (tmp_path / "cut.mp4").write_bytes(mp4[: len(mp4) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    names = ["good.mp4", "cut.mp4", "text.mp4", "none.mp4", "../elsewhere.mp4"]
    lines = [{"video": name, "question": "what happens?", "answer": "a bar grows"} for name in names]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(row_length=400, max_bad_fraction=1.0, pack_buffer=8, video=VideoConfig(3, 0))
    loader = Loader(
        open_source(str(tmp_path / "records.jsonl")), make_process(smolvlm, config), config, 0, num_epochs=1
    )
    assert len(next(loader)) == 1
    assert (loader.counts["documents"], loader.counts["corrupt"]) == (1, 4)
    reasons = " ".join(reason for slot in loader.slots.values() for reason in slot.reasons)
    for part in ("cut.mp4", "its 8 bytes are no mp4, webm or gif", "none.mp4", "outside the folder"):
        assert part in reasons, part


def test_a_record_shows_its_video_where_it_says(mp4, smolvlm):
    times = decode_video(mp4, "the clip", VideoConfig(3, 0)).times
    part = {"type": "video", "times": times, "duration": 5.0}
    read = {"video": VideoConfig(3, 0)}
    plain = to_sample({"video": mp4, "question": "what?", "answer": "a bar"}, **read)
    assert len(plain.images) == 3
    assert plain.messages[0]["content"] == [part, {"type": "text", "text": "what?"}]
    said = [{"role": "user", "content": "now <video> and <video>?"}, {"role": "assistant", "content": "bars"}]
    two = to_sample({"videos": [mp4, {"bytes": mp4}], "messages": said}, **read)
    assert len(two.images) == 6 and [x["type"] for x in two.messages[0]["content"]] == ["text", "video"] * 2 + ["text"]
    said[0]["content"] = [{"type": "video"}, {"type": "text", "text": "what?"}]
    assert to_sample({"videos": [mp4], "messages": said}, **read).messages[0] == plain.messages[0]
    turns = [{"user": "what?", "assistant": "a bar"}, {"user": "why?", "assistant": "so"}]
    several = to_sample({"video": mp4, "texts": turns, "independent": True}, **read)
    document = smolvlm.document(several)
    assert len(several.images) == len(document.tiles) == 3 and int(document.branch_ids.max()) == 2
    # A video is held out, or counted as seen, by its file.
    (first,), (same,) = (digests({"video": mp4, "question": x, "answer": "b"})[0] for x in "ac")
    assert first == same
    for raw, message in (
        ({"video": mp4, "image": b"x", "question": "a", "answer": "b"}, "the record has pictures and videos"),
        ({"audio": b"x", "question": "a", "answer": "b"}, "audio is not empty, and sound is not read"),
        (
            {"video": "a.mp4", "question": "a", "answer": "b"},
            r"video 0 must be an encoded file .* only the name 'a.mp4'",
        ),
        ({"videos": mp4, "question": "a", "answer": "b"}, "videos must be a list, not bytes"),
    ):
        with pytest.raises(UserError, match=message):
            to_sample(raw)


def test_a_document_is_that_of_its_text_and_pictures(smolvlm):
    """Training and asking write a clip alike: frames as pictures of one tile, with the same words between."""
    clip = Clip([noise(i, 40) for i in range(2)], [0.0, 1.0], 2.0)
    messages = [
        {"role": "user", "content": [clip.part(), QUESTION]},
        {"role": "assistant", "content": "nothing"},
    ]
    document = smolvlm.document(Sample(clip.images, messages))
    by_hand = smolvlm.for_frames().document(Sample(clip.images, tell(messages, "smolvlm")))
    assert torch.equal(document.input_ids, by_hand.input_ids) and torch.equal(document.tiles, by_hand.tiles)
    prompt = smolvlm.prompt(messages[:1], clip.images)
    assert torch.equal(document.input_ids[: len(prompt)], prompt.input_ids)
    pair = smolvlm.pair(Sample(clip.images, messages, rejected={"role": "assistant", "content": "much"}))
    assert len(pair.tiles) == 2 and int(pair.branch_ids.max()) == 2
    times = Processor(smolvlm.tokenizer, SMOLVLM, dataclasses.replace(smolvlm.config, video_prompt="times"))
    text = times.tokenizer.decode(times.prompt(messages[:1], clip.images).input_ids.tolist())
    assert "0.0s:" in text and "1.0s:" in text and "frames" not in text
