"""What a shard has of a record: all of it, or messages that say the same."""

import datetime
import io

import pytest
from PIL import Image

from nanovlm.data.columns import parse_fields
from nanovlm.data.members import encode, members_of, to_record
from nanovlm.data.records import check, to_sample
from nanovlm.data.shard_writer import ShardWriter
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError


def picture(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def test_a_record_is_written_as_it_is_without_what_json_cannot_hold():
    raw = {"image": picture(), "question": "a?", "answers": ["b", "c"], "license": "CC0", "made": datetime.date.today()}
    images, record = to_record(raw)
    assert images == [picture()] and record == {"question": "a?", "answers": ["b", "c"], "license": "CC0"}
    assert list(members_of(raw)) == ["0.png", "json"]


def test_what_messages_say_is_written_as_messages_where_that_is_asked():
    texts = [{"user": "a?", "assistant": "b", "kind": "color"}]
    raw = {"prompt": "a?", "completion": "b", "image": picture(), "license": "CC0"}
    parts = [{"type": "image"}, {"type": "text", "text": "a?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    assert to_record(raw)[1] == {"prompt": "a?", "completion": "b", "license": "CC0"}
    assert to_record(raw, as_messages=True)[1] == {"messages": messages, "license": "CC0"}
    assert to_record({"texts": texts}, as_messages=True)[1] == {"texts": texts}, "kinds are no part of messages"


@pytest.mark.parametrize(
    ("raw", "options"),
    [
        ({"q": "a?", "a": "b", "img": picture()}, {"fields": ("question=q", "answer=a", "image=img")}),
        ({"question": "a?", "answer": "b", "caption": "c", "image": picture()}, {"layout": "caption"}),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4))}]},
                       {"role": "assistant", "content": "b"}]}, {}),
        ({"prompt": "a?", "chosen": "b", "rejected": "c", "text": "d", "image": picture()}, {"layout": "preference"}),
        ({"messages": [{"role": "user", "content": "a?", "at": datetime.date.today()},
                       {"role": "assistant", "content": "b"}], "image": picture()}, {}),
    ],
)  # fmt: skip
def test_what_is_written_reads_as_the_record_did_without_its_options(raw, options):
    options = options | {"fields": parse_fields(options.get("fields", ()))}
    was = to_sample(raw, **options)
    for as_messages in (False, True):
        images, record = to_record(raw, options, as_messages)
        now = to_sample(record | {"images": images})
        assert (now.messages, now.rejected) == (was.messages, was.rejected)
        assert [x.tobytes() for x in now.images] == [x.tobytes() for x in was.images]


MP4, WEBM = b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3 and so on"


def test_videos_are_written_as_they_are(tmp_path):
    raws = [
        {"video": MP4, "texts": [{"user": "a?", "assistant": "b"}]},
        {"videos": [WEBM, MP4], "messages": [{"role": "user", "content": "<video> or <video>?"},
                                             {"role": "assistant", "content": "the first"}]},
    ]  # fmt: skip
    with ShardWriter(tmp_path) as writer:
        for number, raw in enumerate(raws):
            writer.write(str(number), members_of(raw))
    source = open_source(str(tmp_path / "*.tar"))
    back = [source.read(number) for number in range(2)]
    assert [record["videos"] for record in back] == [[MP4], [WEBM, MP4]]
    assert list(map(check, back)) == list(map(check, raws))
    assert list(members_of(raws[1])) == ["0.webm", "1.mp4", "json"]


def test_a_sample_that_has_pictures_shows_no_video_beside_them(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"mp4": MP4, "jpg": picture(), "json": b'{"caption": "b"}'})
        writer.write("b", {"mp4": MP4, "json": b'{"caption": "b", "videos": ["x.mp4", "y.mp4"]}'})
    source = open_source(str(tmp_path / "*.tar"))
    assert source.read(0) == {"caption": "b", "images": [picture()]}
    with pytest.raises(UserError, match=r"sample b of .* names 2 videos in 'videos' and has 1"):
        source.read(1)


@pytest.mark.parametrize("video", [b"GIF89a", b"no video"])
def test_a_video_that_a_tar_cannot_tell_from_a_picture_is_refused(video):
    with pytest.raises(UserError, match="a video that is no mp4 or webm file"):
        members_of({"video": video, "texts": [{"user": "a?", "assistant": "b"}]})


def test_a_picture_of_no_kind_that_is_read_is_refused():
    with pytest.raises(OSError, match="cannot identify"):
        encode(b"%PDF-1.4 no picture")
