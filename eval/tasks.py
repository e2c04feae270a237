"""What to ask: each task is a list of questions about held-out images."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from nanovlm.data.scenes import Scenes
from nanovlm.data.source import Source


@dataclass(frozen=True)
class Question:
    scene: int  # index of its image in the task
    kind: str
    text: str
    truth: str


class SceneTask:
    """The questions of one held-out split of the drawn scenes."""

    def __init__(self, split: str, num_scenes: int):
        raw = [Scenes(split).read(i) for i in range(num_scenes)]
        self.images = [scene["images"][0] for scene in raw]
        self.questions = [
            Question(i, turn["kind"], turn["user"], turn["assistant"])
            for i, scene in enumerate(raw)
            for turn in scene["texts"]
        ]

    def without_scenes_of(self, training: "TrainingScan") -> int:
        """Drop scenes whose pixels occur in training, byte for byte; return how many."""
        repeated = {i for i, image in enumerate(self.images) if digest(image) in training.digests}
        self.questions = [question for question in self.questions if question.scene not in repeated]
        return len(repeated)


class TrainingScan:
    """What the training scenes alone give away: their pixels, and the commonest answer to each question."""

    def __init__(self, source: Source, keys: Sequence):
        """Read the records of a source by these keys."""
        self.digests = set()
        self.by_text, self.by_kind = defaultdict(Counter), defaultdict(Counter)
        for key in tqdm(keys, desc="reading the training scenes", unit="scene", mininterval=1):
            raw = source.read(key)
            self.digests.add(digest(raw["images"][0]))
            for turn in raw["texts"]:
                self.by_text[turn["user"]][turn["assistant"]] += 1
                self.by_kind[turn["kind"]][turn["assistant"]] += 1

    def guess(self, question: Question) -> str:
        """The commonest training answer to the question, or to its kind where training never asks it."""
        counts = self.by_text.get(question.text) or self.by_kind[question.kind]
        return counts.most_common(1)[0][0] if counts else ""


def digest(image: Image.Image) -> bytes:
    """Name an image by its pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
