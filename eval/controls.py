"""Controls for the scores of a task: other images, and training answers given without looking."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from PIL import Image
from tqdm import tqdm

from nanovlm import distributed
from nanovlm.data.records import to_sample
from nanovlm.data.source import Source
from nanovlm.data.video import shows_video
from nanovlm.eval.questions import Question, ask

MOST_RECORDS = 50_000


class TrainingScan:
    """Digests of the images in training records, and the commonest training answer to each question."""

    def __init__(self, source: Source, keys: Iterable, **how):
        """Read the first MOST_RECORDS records with these keys again, as records.py reads them by `how`.

        Those that cannot be read are skipped; `num_read` counts the others.
        """
        self.digests, self.num_read = set(), 0
        self.by_text, self.by_kind = defaultdict(Counter), defaultdict(Counter)
        keys = list(itertools.islice(keys, MOST_RECORDS // distributed.num_ranks()))
        is_silent = distributed.rank() > 0
        for key in tqdm(keys, desc="reading training records", unit="record", mininterval=1, disable=is_silent):
            try:
                raw = source.read(key)
                questions = ask(raw, 0, **how)
                images = questions[0].images if questions else to_sample(raw, **how).images  # a text asks nothing
            except Exception:
                continue
            self.num_read += 1
            self.digests |= {digest(image) for image in images}
            for question in questions:
                self.by_text[question.text][question.truth] += 1
                self.by_kind[question.kind][question.truth] += 1

    def add_up(self):
        """Merge what the ranks have read."""
        scans = distributed.gather((self.digests, self.by_text, self.by_kind))
        self.digests = set().union(*(digests for digests, _, _ in scans))
        for number, name in ((1, "by_text"), (2, "by_kind")):
            counts = defaultdict(Counter)
            for scan in scans:
                for key, counter in scan[number].items():
                    counts[key] += counter
            setattr(self, name, counts)

    def guess(self, question: Question) -> str:
        """Return the commonest training answer to the question, or to its kind if training never asks it."""
        counts = self.by_text.get(question.text) or self.by_kind[question.kind]
        return counts.most_common(1)[0][0] if counts else ""

    def leave_out(self, questions: list[Question]) -> list[Question]:
        """Return the questions of those records of which no image occurs in training, byte for byte."""
        shown = {q.record for q in questions if any(digest(image) in self.digests for image in q.images)}
        return [question for question in questions if question.record not in shown]


def digest(image: Image.Image) -> bytes:
    """Hash the pixels of an image."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def blank_images(questions: list[Question]) -> list[list[Image.Image]]:
    """Return grey images in place of those of each question."""
    return [[Image.new("RGB", image.size, (128, 128, 128)) for image in question.images] for question in questions]


def still_images(questions: list[Question]) -> list[list[Image.Image]]:
    """Return, for each question about a video, its middle frame in place of all; the images of each other question."""
    return [
        [question.images[len(question.images) // 2]] * len(question.images)
        if shows_video(question.messages)
        else question.images
        for question in questions
    ]


def shuffled_images(questions: list[Question]) -> list[list[Image.Image]]:
    """Return, for each question, the images of the next record that has as many."""
    by_number = defaultdict(dict)
    for question in questions:
        by_number[len(question.images)][question.record] = question.images
    after = {}
    for of_records in by_number.values():
        records = list(of_records)
        after |= dict(zip(records, [of_records[r] for r in records[1:] + records[:1]], strict=True))
    return [after[question.record] for question in questions]
