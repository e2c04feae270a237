"""`data.fields`: columns of any name -> the names that layouts (layouts.py) read."""

import difflib
from collections.abc import Sequence

from nanovlm.data.layouts import LAYOUTS
from nanovlm.data.pictures import PICTURE_KEYS, VIDEO_KEYS, Record, is_empty, list_keys
from nanovlm.errors import UserError

# Names that `data.fields` may give to columns.
FIELDS = sorted(
    {*PICTURE_KEYS, *VIDEO_KEYS, "independent", "system"}
    | {key for layout in LAYOUTS.values() for need in (*layout.needs, *layout.also) for key in need.split("|")}
)


def parse_fields(fields: Sequence[str]) -> dict[str, list[str]]:
    """Parse `data.fields`: name=column, or name=column,column for a list of what these hold."""
    parsed = {}
    for field in fields:
        name, _, columns = field.partition("=")
        if not all([name, *columns.split(",")]):
            raise UserError(f"data.fields = {field!r} must be name=column, as in image=img")
        if name not in FIELDS:
            nearest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)[0]
            raise UserError(
                f"data.fields: no layout reads {name!r} (in {field!r}, name=column); the nearest is {nearest!r}, "
                "all are in the table of docs/records.md"
            )
        parsed[name] = columns.split(",")
    return parsed


def rename(raw: dict, fields: dict[str, list[str]]) -> dict:
    """Give columns the names of `data.fields`. Raises UserError where neither column nor name is there."""
    if not fields:
        return raw
    taken = {column for columns in fields.values() for column in columns}
    renamed = {key: value for key, value in raw.items() if key not in taken}
    for name, columns in fields.items():
        there = [column for column in columns if column in raw]
        if not there and name not in raw and not (name in PICTURE_KEYS and "images" in raw):
            raise UserError(
                f"the record has no {columns[0]!r}, which data.fields names for {name}; its keys are: {list_keys(raw)}"
            )
        if there and name in PICTURE_KEYS:
            renamed = {key: value for key, value in renamed.items() if key not in PICTURE_KEYS}
        if len(columns) > 1:
            renamed[name] = [raw[column] for column in there if not is_empty(raw[column])]
        elif there:
            renamed[name] = raw[columns[0]]
    return Record(renamed, raw.read) if isinstance(raw, Record) else renamed
