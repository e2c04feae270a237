"""Random answers with references, on which two scorers can be compared: `make_pairs(seed, num)`."""

import random

# What the published scorers treat in different ways: case, articles, punctuation, numbers, contractions, letters.
WORDS = (
    "a an the red blue cat dog two 2 ten 10 none isnt isn't what's couldnt've u.s. 3.5 .5 1,000 1000 50% 0.5 0 0.0 -7 "
    "x-y e=mc2 (A) A A. B) b C: D yes no Yes No, nothing USA. stop? \u00e9t\u00e9 \uff21\uff22 [sic] it/them"
).split()


FORMS = ("{}", "{}.", "({})", "{}. a cat", "The answer is {}", "{} there is", "not C. but {}", "It is {}, Because")


def make_pairs(seed: int = 0, num: int = 200) -> list[tuple[str, tuple[str, ...]]]:
    """Make (answer, references) pairs: equal, nearly equal and unrelated ones, to ten references, and choices."""
    rng = random.Random(seed)
    return [_make_pair(rng) for _ in range(num)]


def _make_pair(rng):
    if rng.random() < 0.5:  # a choice, or yes or no
        kind = rng.choice(("ABCD", "AB", ("yes", "no")))
        return rng.choice(FORMS).format(rng.choice(kind)), (rng.choice(kind),)
    base = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    references = [base if rng.random() < 0.4 else _change(rng, base) for _ in range(rng.choice((1, 2, 3, 10)))]
    answer = base if rng.random() < 0.4 else _change(rng, base)
    return answer, tuple(references)


def _change(rng, text):
    """Return the text with one thing changed: a character, the case, white space, the number, or all of it."""
    change, place = rng.randrange(6), rng.randrange(len(text) + 1)
    if change == 0:
        return text[:place] + rng.choice("abc .,") + text[place:]
    if change == 1:
        return text[:place] + text[place + 1 :] or "a"
    if change == 2:
        return text.upper() if rng.random() < 0.5 else text.lower()
    if change == 3:
        return text.replace(" ", rng.choice(("  ", "\n", "\t")), 1)
    if change == 4 and text.replace(".", "", 1).isdigit():
        return str(float(text) * rng.choice((0.9, 0.95, 1.05, 1.06)))
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
