"""A model's reply -> the data in it, where it is exactly what was asked for; else a reason to drop it.

A reply is one JSON object, alone or in one code fence. A schema is one of JSON Schema, in the few words that `texts`,
`lists` and `objects` write, and can be sent to a server as it is. Reasons hold no word of the reply: they are counted,
and nothing of what is broken is stored.
"""

import json
import re
from typing import Any

LONGEST, DEEPEST, LARGEST_NUMBER = 20_000, 8, 1e15  # characters, brackets within brackets, size of a number
FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}


class Broken(ValueError):
    """Raised for a reply that is not what was asked for; the message says why, in words that are not its own."""


def read_reply(text: str, schema: dict) -> dict:
    """Return the object in a reply. Raises Broken."""
    text = text.rpartition("</think>")[2].strip()
    if fenced := FENCE.fullmatch(text):
        text = fenced[1].strip()
    if not text:
        raise Broken("it is empty")
    if len(text) > LONGEST:
        raise Broken(f"it has more than {LONGEST} characters")
    if find_depth(text) > DEEPEST:
        raise Broken(f"it is nested deeper than {DEEPEST}")
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except Broken:
        raise
    except (ValueError, RecursionError):
        raise Broken("it is no JSON") from None
    check(data, schema)
    return data


def find_depth(text: str) -> int:
    """Return how deep brackets are nested, outside of strings."""
    depth = deepest = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
        deepest = max(deepest, depth)
    return deepest


def check(data: Any, schema: dict, where: str = "it"):
    """Raise Broken for data that a schema does not allow."""
    name = schema["type"]
    if not isinstance(data, TYPES[name]) or isinstance(data, bool):
        raise Broken(f"{where} is no {name}")
    if name == "object":
        for key in schema["required"]:
            if key not in data:
                raise Broken(f"{where} lacks {key}")
        if len(data) > len(schema["properties"]):  # all of which are required
            raise Broken(f"{where} has a key that was not asked for")
        for key, value in data.items():
            check(value, schema["properties"][key], key if where == "it" else f"{where}.{key}")
    elif name == "array":
        if not schema["minItems"] <= len(data) <= schema["maxItems"]:
            raise Broken(f"{where} has not {schema['minItems']} to {schema['maxItems']} items")
        for value in data:
            check(value, schema["items"], f"{where}[]")
    elif name == "string":
        if not data.strip():
            raise Broken(f"{where} is empty")
        if re.search("[\ud800-\udfff]", data):
            raise Broken(f"{where} has half a surrogate pair, which is no text")
        if len(data) > schema["maxLength"]:
            raise Broken(f"{where} is longer than {schema['maxLength']} characters")
    elif not -LARGEST_NUMBER <= data <= LARGEST_NUMBER:
        raise Broken(f"{where} is too large a number")


def texts(length: int) -> dict:
    """Return the schema of a text."""
    return {"type": "string", "minLength": 1, "maxLength": length}


def lists(items: dict, least: int, most: int) -> dict:
    """Return the schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def objects(**properties: dict) -> dict:
    """Return the schema of an object that has these keys and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise Broken("it has a key twice")
    return data


def _refuse_constant(_name):
    raise Broken("it has a number that is none of JSON")
