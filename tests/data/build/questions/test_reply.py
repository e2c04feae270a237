"""Strict JSON: what Python's own reader and JSON Schema say, and what neither of them refuses."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.data.build.questions.kinds import KINDS
from nanovlm.data.build.questions.reply import DEEPEST, Broken, find_depth, lists, objects, read_reply, texts

SCHEMA = objects(a=lists(objects(b=texts(9), c={"type": "number"}), 1, 2), d={"type": "integer"})
GOOD = {"a": [{"b": "x", "c": 0.5}], "d": 3}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('[]{}"\\ab'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab[{"', max_size=3), inner, max_size=3),
    max_leaves=20,
)


def depth_of(data) -> int:
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@settings(max_examples=60, deadline=None)
@given(JSON, st.sampled_from([None, 2]))
def test_depth_is_that_of_the_parsed_data(data, indent):
    assert find_depth(json.dumps(data, indent=indent)) == depth_of(data)


@pytest.mark.parametrize("text", ["{}", "```json\n{}\n```", "```\n{}\n```", "<think>{\n</think>\n{}", " \n{} "])
def test_an_object_alone_or_in_one_fence_is_read(text):
    assert read_reply(text.replace("{}", json.dumps(GOOD)), SCHEMA) == GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("Here it is: {}", "it is no JSON"),
        ("{} {}", "it is no JSON"),
        ("```json\n{}\n```\n```json\n{}\n```", "it is no JSON"),
        ("{'a': 1}", "it is no JSON"),
        ('{"d": 1,}', "it is no JSON"),
        ("[]", "it is no object"),
        ("null", "it is no object"),
        ('"a"', "it is no object"),
        ('{"d": Infinity}', "it has a number that is none of JSON"),
        ('{"d": 1, "d": 1}', "it has a key twice"),
        ('{"a": [], "d": 1}', "a has not 1 to 2 items"),
        (json.dumps(GOOD | {"a": GOOD["a"] * 3}), "a has not 1 to 2 items"),
        (json.dumps({"a": GOOD["a"]}), "it lacks d"),
        (json.dumps(GOOD | {"e": 1}), "it has a key that was not asked for"),
        (json.dumps(GOOD | {"d": True}), "d is no integer"),
        (json.dumps(GOOD | {"d": 1.5}), "d is no integer"),
        (json.dumps(GOOD | {"d": 10**400}), "d is too large a number"),
        (json.dumps(GOOD).replace("0.5", "1e999"), "a[].c is too large a number"),
        (json.dumps(GOOD | {"a": [{"b": "", "c": 1}]}), "a[].b is empty"),
        (json.dumps(GOOD | {"a": [{"b": "\ud800", "c": 1}]}), "a[].b has half a surrogate pair, which is no text"),
        (json.dumps(GOOD | {"a": [{"b": "x" * 10, "c": 1}]}), "a[].b is longer than 9 characters"),
        (json.dumps(GOOD | {"a": [{"b": ["x"], "c": 1}]}), "a[].b is no string"),
        (json.dumps(GOOD | {"a": [{"b": "x", "c": False}]}), "a[].c is no number"),
        ("[" * (DEEPEST + 1), f"it is nested deeper than {DEEPEST}"),
        ('{"d": ' + "9" * 19_000 + "}", "it is no JSON"),
        ('{"d": "' + "[" * 9, "it is no JSON"),
        ("[" * 30_000, "it has more than 20000 characters"),
    ],
)
def test_what_is_broken_has_one_reason(text, reason):
    with pytest.raises(Broken) as caught:
        read_reply(text, SCHEMA)
    assert str(caught.value) == reason


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_the_check_is_that_of_json_schema(data):
    """The same data pass as with jsonschema, where it is installed; blank texts and huge numbers are refused beyond."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    forms = (data, GOOD | {"d": data}, GOOD | {"a": [data]}, GOOD | {"a": [GOOD["a"][0] | {"b": data}]})
    for form in forms:
        if isinstance(data, float) and data.is_integer():  # 1.0 is an integer there
            continue
        try:
            read_reply(json.dumps(form), SCHEMA)
            is_read = True
        except Broken as error:
            if "empty" in str(error) or "too large" in str(error) or "deeper" in str(error):
                continue
            is_read = False
        assert is_read == jsonschema.Draft202012Validator(SCHEMA).is_valid(form), form


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_in_a_prompt_is_that_of_its_schema(kind):
    """What a prompt shows as its form passes."""
    form = KINDS[kind].prompt.strip().rpartition("\n")[2]
    data = read_reply(form, KINDS[kind].schema(3))
    assert KINDS[kind].items(data, ["x"], random.Random(0))
