"""Text -> the form in which the published scorers of VQA compare answers (EvalAI's, of VQAv2 and TextVQA).

The steps and the tables are those of the VQA challenge's scorer (https://visualqa.org/evaluation.html), in which some
rules have odd cases; they are kept, because scores are compared with those that it gave.
"""

import re

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words with apostrophes. Each is also known with any one of its apostrophes left out, and is then completed.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# That scorer writes the first one the other way round; its entries in capitals are never found, and not here.
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
}


def normalise(text: str) -> str:
    """Lower the case and take out punctuation and articles; numbers to ten become digits. TextVQA's form."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_words(normalise_punctuation(re.sub(r"[\n\t]", " ", text.strip()).strip()))


def normalise_vqav2(text: str) -> str:
    """The same in VQAv2's form, which leaves possessives and thousands' commas to the rules of punctuation."""
    return normalise_words(normalise_punctuation(re.sub(r"[\n\t]", " ", text).strip()))


def normalise_punctuation(text: str) -> str:
    """Take out a mark that stands beside a space or, in a text with a number like 1,000, anywhere; else it is a space.

    A full stop goes unless a digit follows. Only the first 32 go: the scorers pass a flag, re.UNICODE, as the count.
    """
    has_thousands = re.search(r"(?<=\d),+(?=\d)", text) is not None
    result = text
    for mark in PUNCTUATION:
        is_beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if is_beside_space or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalise_words(text: str) -> str:
    """Lower the case, write numbers as digits, drop articles and complete contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
