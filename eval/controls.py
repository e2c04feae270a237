"""What the scores of a task are held against: other images, and what training gives away without a look."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from PIL import Image
from tqdm import tqdm

from eval.tasks import Question, ask
from nanovlm import distributed
from nanovlm.data.source import Source

MOST_RECORDS = 50_000


class TrainingScan:
    """What training records alone give away: the pixels of their images, and the commonest answer to each question."""

    def __init__(self, source: Source, keys: Iterable):
        """Read the first of the records with these keys again; what cannot be read is left out."""
        self.digests = set()
        self.by_text, self.by_kind = defaultdict(Counter), defaultdict(Counter)
        keys = list(itertools.islice(keys, MOST_RECORDS // distributed.num_ranks()))
        is_silent = distributed.rank() > 0
        for key in tqdm(keys, desc="reading training records", unit="record", mininterval=1, disable=is_silent):
            try:
                questions = ask(source.read(key), 0)
            except (ValueError, OSError):
                continue
            self.digests |= {digest(image) for image in questions[0].images}
            for question in questions:
                self.by_text[question.text][question.truth] += 1
                self.by_kind[question.kind][question.truth] += 1

    def add_up(self):
        """Put together what the ranks have read."""
        scans = distributed.gather((self.digests, self.by_text, self.by_kind))
        self.digests = set().union(*(digests for digests, _, _ in scans))
        for number, name in ((1, "by_text"), (2, "by_kind")):
            counts = defaultdict(Counter)
            for scan in scans:
                for key, counter in scan[number].items():
                    counts[key] += counter
            setattr(self, name, counts)

    def guess(self, question: Question) -> str:
        """The commonest training answer to the question, or to its kind where training never asks it."""
        counts = self.by_text.get(question.text) or self.by_kind[question.kind]
        return counts.most_common(1)[0][0] if counts else ""

    def leave_out(self, questions: list[Question]) -> list[Question]:
        """Return the questions of records whose images do not occur in training, byte for byte."""
        shown = {q.record for q in questions if any(digest(image) in self.digests for image in q.images)}
        return [question for question in questions if question.record not in shown]


def digest(image: Image.Image) -> bytes:
    """Name an image by its pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def blank_images(questions: list[Question]) -> list[list[Image.Image]]:
    """Return grey images in place of those of each question."""
    return [[Image.new("RGB", image.size, (128, 128, 128)) for image in question.images] for question in questions]


def shuffled_images(questions: list[Question]) -> list[list[Image.Image]]:
    """Return in place of each question's images those of the next record that has as many."""
    by_number = defaultdict(dict)
    for question in questions:
        by_number[len(question.images)][question.record] = question.images
    after = {}
    for of_records in by_number.values():
        records = list(of_records)
        after |= dict(zip(records, [of_records[r] for r in records[1:] + records[:1]], strict=True))
    return [after[question.record] for question in questions]
