"""Records of a chosen and a rejected answer -> documents of two branches, or one sentence that says why not."""

import json

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import Loader
from nanovlm.data.process import make_process
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import open_source, sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATES, train_tokenizer
from nanovlm.data.types import IGNORE, Shrunk
from nanovlm.errors import UserError
from tests.conftest import TINY, noise
from tests.data.test_process import TILINGS
from tests.data.test_process import make_processor as with_tiling

ASKED = {"role": "user", "content": "what is it?"}


def said(text):
    return {"role": "assistant", "content": text}


def pair_of(processor, raw):
    return make_process(processor, DataConfig(), learns_from="pairs")(raw)


def parts(document):
    """The tokens of the prefix and of each branch, and their labels."""
    of = [document.branch_ids == number for number in range(3)]
    return [document.input_ids[x].tolist() for x in of], [document.labels[x].tolist() for x in of]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("answers", [("red", "blue"), ("red", "red and blue"), ("a red one", "a blue one"), ("no", "")])
def test_a_pair_is_the_prompt_and_two_branches(template, answers):
    """Each branch after the prefix is its conversation written out to the end of the answer, alone trained."""
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512)
    written = CHAT_TEMPLATES[template].replace("<|im_end|>", tokenizer.id_to_token(TINY.eos_token_id))
    processor = Processor(tokenizer, written, TINY)
    turns = [ASKED, said("a square"), {"role": "user", "content": "and its color?"}]
    raw = {"image": noise(0), "prompt": turns, "chosen": answers[0], "rejected": answers[1]}
    document = pair_of(processor, raw)
    (prefix, *branches), (prefix_labels, *labels) = parts(document)
    assert set(prefix_labels) == {IGNORE} and len(document.tiles) == 1
    prompt = processor.prompt(turns, [noise(0)]).input_ids.tolist()
    for answer, branch, targets in zip(answers, branches, labels, strict=True):
        sample = to_sample({"image": noise(0), "messages": [*turns, said(answer)]})
        whole = processor.document(sample).input_ids.tolist()
        assert whole[: len(prefix) + len(branch)] == prefix + branch and branch[-1] == TINY.eos_token_id
        assert TINY.eos_token_id not in whole[len(prefix) + len(branch) :]
        assert targets == [*branch[1:], IGNORE]
        assert prompt[: len(prefix) + 1] == prefix + branch[:1]
    assert len(prompt) == len(prefix) + 1  # the first branch begins with the last token of the prompt
    positions = document.position_ids[document.branch_ids == 2].tolist()
    assert positions == list(range(len(prefix), len(prefix) + len(branches[1])))


EQUAL = [
    {"prompt": "what is it?", "chosen": "red", "rejected": "blue"},
    {"question": "what is it?", "chosen": "red", "rejected": "blue", "origin_dataset": "a", "ds_name": "b"},
    {"prompt": [ASKED], "chosen": [said("red")], "rejected": [said("blue")]},
    {"chosen": [ASKED, said("red")], "rejected": [ASKED, said("blue")]},
    {"prompt": "what is it?", "chosen": [ASKED, said("red")], "rejected": [ASKED, said("blue")]},
    {
        "conversations": [{"from": "human", "value": "<image>what is it?"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue"},
    },
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
    },
]


@pytest.mark.parametrize("raw", EQUAL, ids=lambda raw: " ".join(raw))
def test_layouts_of_pairs_are_one_document(processor, raw):
    expected, found = (pair_of(processor, x | {"image": noise(0)}) for x in (EQUAL[0], raw))
    assert parts(found) == parts(expected) and torch.equal(found.tiles, expected.tiles)


def test_a_pair_read_for_answers_trains_the_chosen(processor):
    process = make_process(processor, DataConfig())
    found = process(EQUAL[0] | {"image": noise(0)})
    expected = process({"image": noise(0), "question": "what is it?", "answer": "red"})
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)


def test_a_pair_in_a_conversation_with_a_system_prompt(processor):
    raw = {"prompt": [{"role": "system", "content": "be brief"}, ASKED], "chosen": "red", "rejected": "blue"}
    beside = {"system": "be brief", "prompt": "what is it?", "chosen": "red", "rejected": "blue"}
    assert parts(pair_of(processor, raw)) == parts(pair_of(processor, beside))


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"question": "what?", "answer": "red"}, "the record is no pair, .*: it needs chosen and rejected"),
        ({"prompt": "what?", "chosen": "red", "rejected": "red"}, "chosen and rejected are equal"),
        ({"chosen": [ASKED, said("red")], "rejected": [ASKED, said("red")]}, "chosen and rejected are equal"),
        ({"chosen": "red", "rejected": "blue"}, "have no prompt beside them: .* --data.fields prompt=q"),
        (
            {"chosen": [ASKED, said("red")], "rejected": [{"role": "user", "content": "who?"}, said("blue")]},
            "one answer each to the same prompt",
        ),
        (
            {"prompt": "what?", "chosen": [said("red")], "rejected": [{"role": "user", "content": "blue"}]},
            "one answer each to the same prompt",
        ),
        ({"prompt": "what?", "chosen": "red", "rejected": "<image>blue"}, "rejected answer shows a picture"),
        ({"prompt": "what?", "chosen": 1, "rejected": "blue"}, "chosen must be a list, not int"),
        ({"prompt": "what?", "chosen": "red", "rejected": "blue", "ref_chosen_logps": 1.0}, "must be two log-prob"),
        ({"prompt": "a", "completion": "red", "label": True}, "it is no pair: name the two answers"),
    ],
)
def test_what_is_no_pair_is_told(processor, raw, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        pair_of(processor, raw)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_reference_log_probabilities_come_with_records(processor, tmp_path):
    """As sums of whole answers (TRL), through the loader; NaN where a record has none."""
    records = [
        EQUAL[0] | {"ref_chosen_logps": -3.5, "ref_rejected_logps": -7.0},
        EQUAL[0] | {"chosen": "green and red"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in records))
    config = DataConfig(row_length=128, batch_rows=1, shuffle=False)
    loader = Loader(
        open_source(str(tmp_path / "a.jsonl")), make_process(processor, config, "pairs"), config, 0, num_epochs=1
    )
    (batch,) = next(loader)
    values, branches = batch.value("ref_logprobs"), batch.branch_ids.flatten()[batch.trained]
    documents = batch.doc_ids.flatten()[batch.trained]
    sums = [float(values[(documents == d) & (branches == b)].sum()) for d in (0, 1) for b in (1, 2)]
    known = sorted(x for x in sums if x == x)
    assert known == [-7.0, -3.5] and sum(x != x for x in sums) == 2


def test_a_pair_that_is_too_long_gets_fewer_tiles():
    processor = with_tiling(TILINGS["fit"])
    raw = {"image": noise(0, 60).resize((60, 50)), "prompt": "what is it?", "chosen": "red", "rejected": "blue"}
    whole = make_process(processor, DataConfig(row_length=1000), learns_from="pairs")(raw)
    config = DataConfig(row_length=len(whole) - 1, too_long="shrink")
    shrunk = make_process(processor, config, learns_from="pairs")(raw)
    assert isinstance(shrunk, Shrunk) and len(shrunk) < len(whole) and len(shrunk.tiles) < len(whole.tiles)
    assert int(shrunk.branch_ids.max()) == 2 and len(shrunk.values["ref_logprobs"]) == len(shrunk)
