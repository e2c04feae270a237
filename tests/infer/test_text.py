"""Text in pieces is the text of all tokens, for every kind of tokenizer and every sequence of tokens."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nanovlm.data.chat import Processor
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.infer.text import TextStream, after_thinking
from tests.conftest import TINY
from tests.data.chat_templates import byte_level, gemma_style, gpt2_style, llama3_style

SPECIAL = [AddedToken(x, special=True, normalized=False) for x in ("<s>", "<end>")]
TEXTS = ["a red circle", "  two  spaces\n", "naïve 日本 🙂🙂", "a. b ! do n't", "<0x41>\ufffd", "\x00é\n\n re"]


def with_decoder(decoder):
    tokenizer = gemma_style(SPECIAL)
    tokenizer.decoder = decoder
    return tokenizer


def smollm2_style():
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return byte_level(digits, SPECIAL)


def words(decoder, *more):
    """Pieces of words as BERT and GPT-1 write them."""
    pieces = ["a", "##a", "##b", "b</w>", "a</w>", ".", "!", "do", "n't", "##", "</w>", "日", "|", *more]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def with_added():
    """Byte level, with added tokens that are special, that are not, and whose letters are no bytes."""
    tokenizer = gpt2_style(SPECIAL)
    tokenizer.add_tokens([AddedToken("日本 ", normalized=False), AddedToken("é", normalized=False)])
    return tokenizer


replace, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
LLAMA2 = decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 1, 0)])
TOKENIZERS = {
    "ours": train_tokenizer(sample_texts(Scenes("train"), 50), 512),
    "gpt2": gpt2_style(SPECIAL),
    "llama3": llama3_style(SPECIAL),
    "smollm2": smollm2_style(),
    "added": with_added(),
    "gemma": gemma_style(SPECIAL),
    "llama2": with_decoder(LLAMA2),
    "metaspace": with_decoder(decoders.Metaspace()),
    "metaspace in the middle": with_decoder(decoders.Metaspace(prepend_scheme="never")),
    "fallback, metaspace": with_decoder(decoders.Sequence([fallback, decoders.Metaspace()])),
    "wordpiece": words(decoders.WordPiece()),
    "words' ends": words(decoders.BPEDecoder()),
    "repeats": words(decoders.CTC()),
    "no decoder": words(None),
    "changes the whole": with_decoder(decoders.Sequence([replace, fuse, decoders.Replace(Regex(" r|e "), "x")])),
}


def make_processor(name):
    tokenizer = TOKENIZERS[name]
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    ids = {"pad_token_id": special[0], "eos_token_id": special[-1]}
    return Processor(tokenizer, CHAT_TEMPLATE, dataclasses.replace(TINY, vision=None, image_token_id=None, **ids))


@pytest.fixture(params=TOKENIZERS, scope="module")
def speaker(request):
    return make_processor(request.param)


def pieces_of(processor, ids, stop=()):
    stream = TextStream(processor, stop)
    return [*map(stream.add, ids), stream.end()], stream


def ids_of(tokenizer):
    """Sequences of any ids, some beyond the vocabulary, and of those that a text with a change in it has."""
    size = tokenizer.get_vocab_size()
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    some = st.sampled_from(encoded) if any(encoded) else st.nothing()
    runs = [i for i in range(size) if "\ufffd" in tokenizer.decode([i]) or tokenizer.id_to_token(i) in ("▁", "<end>")]
    hard = st.lists(st.sampled_from(runs), max_size=12) if runs else st.nothing()
    part = st.lists(st.integers(0, size + 2), max_size=4) | some | hard
    return st.lists(part, max_size=4).map(lambda parts: [i for part in parts for i in part])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text(speaker, data):
    ids = data.draw(ids_of(speaker.tokenizer))
    assert "".join(pieces_of(speaker, ids)[0]) == speaker.decode(ids)


@pytest.mark.parametrize("name", ["ours", "smollm2", "gemma", "llama2", "metaspace"])
def test_text_comes_at_once(name):
    """After each token all of the text is there, but for a character that is not complete and for a run of bytes."""
    processor = make_processor(name)
    ids = processor.tokenizer.encode("a red circle 日 re🙂", add_special_tokens=False).ids
    pieces, _ = pieces_of(processor, ids)
    for num in range(1, len(ids) + 1):
        shown, text = "".join(pieces[:num]), processor.decode(ids[:num])
        last = processor.tokenizer.id_to_token(ids[num - 1])
        assert shown == text or (text.startswith(shown) and (text[-1] == "\ufffd" or last.startswith("<0x")))
    assert sum(piece != "" for piece in pieces) > 5


def test_a_wrong_byte_changes_those_before_it():
    processor = make_processor("gemma")
    ids = processor.tokenizer.encode("日").ids
    pieces, _ = pieces_of(processor, [*ids, ids[0]])
    assert pieces == ["", "", "", "", "\ufffd" * 4]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cost_is_linear(name):
    """No token is decoded more than three times: as new, and as the one before others, with and without these."""

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.num = tokenizer, 0

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def decode(self, ids, **options):
            self.num += len(ids)
            return self.tokenizer.decode(ids, **options)

    counting = Counting(TOKENIZERS[name])
    processor = make_processor(name)
    hardest = max(TEXTS, key=lambda text: "\ufffd" in processor.decode(counting.encode(text).ids[:-1]))
    ids = counting.encode(hardest).ids or [0]
    ids = (ids * 2000)[:2000] + [ids[0]] * 2000
    processor.tokenizer = counting
    assert "".join(pieces_of(processor, ids)[0]) == TOKENIZERS[name].decode(ids)
    assert counting.num <= 3 * len(ids)


# --- stop strings -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("abc\n", max_size=20),
    stop=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
    name=st.sampled_from(["ours", "llama2"]),
)
def test_nothing_of_a_stop_string_is_shown(text, stop, name):
    """The text ends before the stop string that is complete first, and of two at one place before the longer."""
    processor = make_processor(name)
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    text, ends = processor.decode(ids), []
    pieces, stream = pieces_of(processor, ids, stop)
    for num in range(len(text) + 1):
        ends = [end for end in stop if text[:num].endswith(end)]
        if ends:
            expected, stopped = text[:num].removesuffix(max(ends, key=len)), max(ends, key=len)
            break
    else:
        expected, stopped = text, None
    assert ("".join(pieces), stream.stopped) == (expected, stopped)


def test_what_may_begin_a_stop_string_waits(processor):
    ids = processor.tokenizer.encode("a\nb\n\nc").ids
    pieces, stream = pieces_of(processor, ids, ("\n\n",))
    assert pieces[:4] == ["a", "", "\nb", ""] and pieces[-1] == "" and stream.stopped == "\n\n"
    assert pieces_of(processor, ids[:2], ("\n\n",))[0] == ["a", "", "\n"]


def test_an_empty_stop_string_is_refused(processor):
    with pytest.raises(UserError, match="a stop string must have at least one character"):
        TextStream(processor, ("a", ""))


def test_the_stop_string_that_is_complete_first_counts(processor):
    """However many characters a token has."""
    ids = processor.tokenizer.encode(" triangle").ids
    for stop in ((" triangle", "ang"), ("ang", " triangle")):
        pieces, stream = pieces_of(processor, ids, stop)
        assert len(ids) == 1 and pieces == [" tri", ""] and stream.stopped == "ang"


def test_what_a_model_thought_is_cut_off(processor):
    """Be the end of thinking a special token, or another one, or written in several."""
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    written = Processor(tokenizer, CHAT_TEMPLATE, TINY)
    for special in (None, False, True):
        if special is not None:
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.add_tokens([AddedToken("</think>", special=special, normalized=False)])
            config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, vocab_size=600))
            written = Processor(tokenizer, CHAT_TEMPLATE, config)
        for text, answer in (
            ("<think>a red</think> no</think>\n\na circle ", "a circle"),
            ("a circle", "a circle"),
            ("a red</think>", ""),
        ):
            assert after_thinking(tokenizer.encode(text).ids, written) == answer
