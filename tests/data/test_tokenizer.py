"""The tokenizer that is made from the embedded data."""

import pytest

from nanovlm.data.tilings import FAKE
from nanovlm.data.tokenizer import SPECIAL_TOKENS, read_tokenizer, train_tokenizer
from tests.conftest import TINY


def test_special_tokens_have_the_ids_of_the_config(processor):
    assert [processor.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    ids = (TINY.pad_token_id, TINY.image_token_id, TINY.eos_token_id)
    assert [SPECIAL_TOKENS[i] for i in ids] == ["<|pad|>", "<image>", "<end_of_utterance>"]


@pytest.mark.parametrize("text", ["what color is the circle?", "  two  spaces\n", "naïve 日本 🙂", "\x00\x07", "42"])
def test_any_text_survives(processor, text):
    assert processor.decode(processor.tokenizer.encode(text).ids) == text


def test_words_of_the_data_are_one_token_and_digits_are_apart(processor):
    assert len(processor.tokenizer.encode(" triangle").ids) == 1
    assert processor.tokenizer.encode("42").tokens == ["4", "2"]


def test_same_texts_same_tokenizer(processor):
    from nanovlm.data.scenes import Scenes
    from nanovlm.data.sources import sample_texts

    again = train_tokenizer(sample_texts(Scenes("train"), 50), 512)
    assert again.to_str() == processor.tokenizer.to_str()


def test_extra_special_tokens_come_after_ours():
    tokenizer = train_tokenizer(["a b"], 400, ["<global-img>", "<row_1_col_1>"])
    assert tokenizer.encode("<row_1_col_1><global-img>").ids == [len(SPECIAL_TOKENS) + 1, len(SPECIAL_TOKENS)]
    assert tokenizer.get_added_tokens_decoder()[len(SPECIAL_TOKENS)].special
    with pytest.raises(ValueError, match="tokenizer_size = 263 must be at least 264"):
        train_tokenizer(["a"], 263, ["<global-img>", "<row_1_col_1>"])


@pytest.mark.parametrize("vocab_size", [263, 280, 400])
def test_two_line_breaks_are_one_token_where_idefics3_writes_them(vocab_size):
    texts = ["red circle, blue square, red square"] * 3
    plain = train_tokenizer(texts, vocab_size, ["<a>"]).get_vocab()
    tokenizer = train_tokenizer(texts, vocab_size, [FAKE])
    vocab = {token.replace(FAKE, "<a>"): i for token, i in tokenizer.get_vocab().items()}
    assert sorted(vocab.values()) == list(range(len(vocab))) and len(vocab) <= vocab_size
    if vocab_size == 263:  # room for bytes and special tokens only
        assert vocab == plain
        return
    assert tokenizer.encode(f"{FAKE}\n\n{FAKE}").tokens == [FAKE, "ĊĊ", FAKE]
    changed = {token for token, _ in plain.items() ^ vocab.items()}
    assert changed == {"ĊĊ"} if len(plain) < vocab_size else {"ĊĊ", max(plain, key=plain.get)}
    assert tokenizer.decode(tokenizer.encode("a\n\n red\nblue").ids) == "a\n\n red\nblue"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer_size = 100 must be at least 262"):
        train_tokenizer(["a"], 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer file"):
        read_tokenizer(tmp_path / "tokenizer.json")
