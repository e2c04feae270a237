"""An answer in words -> the letter of the option that it chooses.

Models that were asked for a letter write "B", "(B)", "B. a dog" or "The answer is B". Two published ways to read it:

- `find_letter`, of MMStar and RealWorldQA in lmms-eval: nine kinds of pattern; of the best kind that is found, the last
- `find_mmmu_letter`, of MMMU's own scorer: four kinds, of which the last is the text of an option
"""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Words after which an answer stands, in English, Korean, Chinese and Japanese. The first place of each counts.
NAMES = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
PHRASES = (
    *(f"{the}{name} is" for name in NAMES for the in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def find_letter(answer: str, letters: str = LETTERS[:4]) -> str | None:
    """Return the letter, one of `letters`, that an answer chooses, or None.

    The patterns, best first: the answer begins with the letter, ends with it, has it after a phrase, as (A), A., A:,
    A), or before a space; if there is none of these, anywhere. Of several in the best kind, the last counts.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    bare, lower = text.strip(), text.lower()
    afters = [found + len(phrase) for phrase in PHRASES if (found := lower.find(phrase)) >= 0]
    kinds = (
        lambda x: 0 if bare.startswith(x) and not bare[1:2].isalpha() else -1,
        lambda x: 0 if bare.endswith(x) and not bare[-2:-1].isalpha() else -1,
        lambda x: max((text.find(x, after) for after in afters), default=-1),
        *(lambda x, form=form: text.rfind(form.format(x)) for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}")),
    )
    for place in kinds:
        last = max(letters, key=place)
        if place(last) >= 0:
            return last
    return None


def find_mmmu_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    """Return the letter that an answer chooses by MMMU's rules, or None, for which MMMU draws one.

    The forms, best first: (A), A before a space, A., and in answers of more than five words the text of an option.
    """
    text, letters = answer, LETTERS[: len(choices)]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:  # several are told apart by another pattern than that which found them, as MMMU does
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    places = [text.lower().rfind(choice.lower()) for choice in choices]
    is_found = len(text.split()) > 5 and max(places, default=-1) >= 0
    return letters[places.index(max(places))] if is_found else None
