"""A text -> what can be said about it without a model: its language, how much it repeats, what is no caption in it.

What a text asks for is counted and never done: markup is not read as markup, an instruction is not followed, and a text
that looks like a special token is only a text.
"""

import functools
import re
import unicodedata
from collections import Counter

# The language of letters that hardly any other writes with, by the first word of their names in Unicode.
SCRIPTS = {
    "CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru", "GREEK": "el", "ARABIC": "ar",
    "HEBREW": "he", "DEVANAGARI": "hi", "THAI": "th",
}  # fmt: skip
# Words that are frequent in a language and rare in the others.
WORDS = {
    "en": "the of and is are was with this that there has have his her their from by at which it on what how",
    "de": "der die das und ist sind mit ein eine einer einem nicht auf auch von dem den im zu wird für was wie",
    "fr": "le les des et est sont avec une dans sur du pour pas qui au aux il elle cette ce ses quoi où",
    "es": "el los las y es son con una del por para que se su al lo como está este esta hay qué",
    "it": "il gli della di è sono con una nel per non che si sul dei delle questo questa lo ha cosa",
    "pt": "o os as e é são com uma do da dos das em no na para não que se um ao está",
    "nl": "de het een en is zijn met van op niet dat voor aan er te bij deze dit wordt heeft wat hoe",
    "pl": "i w na z się nie jest są to że do od po przez oraz jego jej które który ma co jak",
}
LANGUAGES = (*WORDS, *dict.fromkeys(SCRIPTS.values()))
LEAST_WORDS = 2  # of a language that have to be there, more than of any other

MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,1000}>|<!--|<!doctype|&(?:lt|gt|amp|nbsp|quot|#\d{1,6});|javascript:", re.I)
# Tokens of chat templates, and the marks of turns, which a text has no business to spell.
CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|start_of_turn|end_of_turn|end_of_utterance)>|"
    r"</?think>",
    re.I,
)
# Sentences by which a text speaks to the model that reads it.
ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b[^.!?\n]{0,40}\b(?:above|previous|prior|earlier|before|preceding|"
    r"instructions?|prompts?|rules|everything)\b"
    r"|\b(?:system|developer)\s+(?:prompt|message|instructions?)\b"
    r"|\byou\s+are\s+(?:now|no\s+longer)\b|\bfrom\s+now\s+on\b[^.!?\n]{0,20}\byou\b"
    r"|\b(?:new|updated|real)\s+instructions?\b|\bdo\s+not\s+follow\b",
    re.I,
)
# What captions of web pages are made of, and what models say in place of an answer.
BOILERPLATE = (
    "all rights reserved", "click here", "click to enlarge", "click for more", "stock photo", "stock image",
    "image unavailable", "image not available", "no photo available", "this image may contain", "photo by",
    "enable javascript", "accept cookies", "lorem ipsum", "as an ai language model", "as an ai assistant",
    "i'm sorry, but i can", "i cannot assist", "i can't assist", "i am unable to view", "i'm unable to view",
    "i cannot see the image", "i can't see the image",
)  # fmt: skip


def find_language(text: str) -> str:
    """Return the code of the language that a text seems to be in, "" where it is too short or in none of LANGUAGES."""
    scripts = Counter(map(_script, filter(str.isalpha, text)))
    if not scripts:
        return ""
    if scripts["LATIN"] < scripts.total() / 2:
        has_kana = scripts["HIRAGANA"] + scripts["KATAKANA"] > scripts.total() / 10
        return "ja" if has_kana else SCRIPTS.get(scripts.most_common(1)[0][0], "")
    words = re.findall(r"[^\W\d_]+", text.lower())
    found = sorted(((sum(word in own for word in words), name) for name, own in _WORDS.items()), reverse=True)
    return found[0][1] if found[0][0] >= LEAST_WORDS and found[0][0] > found[1][0] else ""


@functools.lru_cache(2**16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def repetition(text: str, length: int = 3) -> float:
    """Return the share of a text's sequences of three words that were there before; 0 for a text of few words.

    After the repeated n-grams of MassiveText (arXiv 2112.11446). Where words are not set apart, letters count.
    """
    words = text.lower().split()
    if words and len(text) > 20 * len(words):
        words = [letter for letter in text if not letter.isspace()]
    grams = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= 2 * length else 0.0


def longest_run(text: str) -> int:
    """Count the longest run of one character other than a space."""
    return max((len(run[0]) for run in re.finditer(r"(\S)\1*", text)), default=0)


_WORDS = {name: frozenset(words.split()) for name, words in WORDS.items()}
SIGNS = {"html": MARKUP, "injection": ORDERS, "control": CONTROL}


def count_signs(text: str) -> dict[str, int]:
    """Count what in a text is markup, an order to a model, or spelt like a special token; zeros are left out."""
    counts = {name: sum(1 for _ in sign.finditer(text)) for name, sign in SIGNS.items()}
    return {name: count for name, count in counts.items() if count}
