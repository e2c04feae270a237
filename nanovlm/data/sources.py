"""Where samples come from: raw records, as datasets publish them -> Sample."""

from collections.abc import Iterator

from nanovlm.data import scenes
from nanovlm.data.images import to_rgb
from nanovlm.data.types import Sample


def to_sample(raw: dict) -> Sample:
    """Read a record `{"images": [PIL], "texts": [{"user", "assistant"}, ...], "independent": bool}`.

    The images stand at the beginning of the first user turn, or of every one with `independent`.
    """
    images = [to_rgb(image) for image in raw["images"]]
    messages = []
    for turn in raw["texts"]:
        shown = images if raw.get("independent") or not messages else []
        content = [{"type": "image"} for _ in shown] + [{"type": "text", "text": turn["user"]}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    return Sample(images, messages, independent=bool(raw.get("independent")))


class Scenes:
    """The drawn scenes of one split. `source[i]` is a Sample, `source.raw(i)` has the question kinds too."""

    def __init__(self, split: str, length: int = 1_000_000):
        self.split, self.length = split, length

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return to_sample(self.raw(index))

    def raw(self, index: int) -> dict:
        return scenes.draw(self.split, index)

    def texts(self, num_scenes: int) -> Iterator[str]:
        """Yield the questions and answers of scenes from the whole source, to make a tokenizer from."""
        for index in range(0, len(self), -(-len(self) // num_scenes)):
            for turn in self.raw(index)["texts"]:
                yield from (turn["user"], turn["assistant"])


SOURCES = {"scenes": Scenes}
