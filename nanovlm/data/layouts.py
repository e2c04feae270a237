"""The layouts of published data sets: a raw record of each -> its messages, references and options.

A layout is recognised by a record's keys, or named by `data.layout`; `data.fields` gives columns the names that it
knows (columns.py). What its messages hold is checked in records.py, its pictures are found in pictures.py. Another
layout is a function and an entry of LAYOUTS.
"""

import ast
import itertools
import json
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanovlm.config import pick
from nanovlm.data.pictures import MARKER, PICTURE_KEYS, find_pictures, is_empty, kind_of, list_keys, refuse_in_turn
from nanovlm.errors import UserError

# The question for an image that has only a caption.
CAPTION_QUESTION = "describe the image."
# What follows the options of a multiple choice.
CHOICE_PROMPT = "Answer with the letter of the right option."
LETTERS = string.ascii_uppercase
# Names of who speaks, and the role.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

# Where the prompt of two answers is, and their log-probabilities under a reference as TRL names them.
PROMPTS = ("prompt", "question", "conversations", "conversation", "messages")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")

# By these some formats say that an answer is not trained.
UNTRAINED = ("loss", "weight", "train")


class Conversation(NamedTuple):
    """What a layout makes of a record."""

    # dicts of role and content, as records.py checks them.
    messages: list
    # All that is right for each answer, what is trained first; empty where only that is.
    references: list[tuple[str, ...]] = []  # noqa: RUF012
    # The options of a multiple choice, in the order of their letters.
    options: tuple[str, ...] = ()
    # The message that is worse than the last one, in its place, and the log-probabilities of both under a reference.
    rejected: dict | None = None
    ref_logprobs: tuple[float, float] | None = None


class Layout(NamedTuple):
    """How records of a layout are told and read; `read` raises UserError for a record that it cannot read."""

    read: Callable[[dict], Conversation]
    # The keys that a record has, `|` between such of which one will do.
    needs: tuple[str, ...]
    # Keys that are read where they are there.
    also: tuple[str, ...] = ()
    # Among layouts that are told by keys of a record, the lowest rank decides.
    rank: int = 1


def read_texts(raw: dict) -> Conversation:
    """Pairs of `user` and `assistant`, as FineVision and The Cauldron have them."""
    texts = raw["texts"]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"texts must be a list of at least one turn, not {kind_of(texts)}")
    for number, turn in enumerate(texts):
        for key in ("user", "assistant"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise UserError(f"turn {number} of texts must be a dict with the strings user and assistant")
        refuse_in_turn(turn, ("user", "assistant"))
    return Conversation(_turns((turn["user"], turn["assistant"]) for turn in texts))


def read_messages(raw: dict) -> Conversation:
    """Messages with `role` and `content`, a string or parts of text and image (`image_url` too)."""
    return Conversation(_messages(raw["messages"], "messages"))


def read_conversations(raw: dict) -> Conversation:
    """Messages with `from` and `value` (LLaVA, ShareGPT) or `role` and `content`."""
    key = "conversation" if raw.get("conversations") is None else "conversations"
    return Conversation(_messages(raw[key], key))


def read_query(raw: dict) -> Conversation:
    """One question and answer, earlier ones as pairs in `history` (ms-swift)."""
    return Conversation(_turns([*_history(raw), (_text(raw, "query"), _text(raw, "response"))]))


def read_instruction(raw: dict) -> Conversation:
    """An instruction, its `input` on the next line, and the answer (Alpaca, LLaMA-Factory)."""
    asked = "\n".join(_text(raw, key) for key in ("instruction", "input") if raw.get(key) not in (None, ""))
    return Conversation(_turns([*_history(raw), (asked, _text(raw, "output"))]))


def read_question(raw: dict) -> Conversation:
    """A question and its answers: the first is trained (`answer` before `answers`), all of them are right."""
    key = next(k for k in ("answer", "multiple_choice_answer", "answers") if raw.get(k) is not None)
    trained = _answers(raw, key)[0]
    right = _answers(raw, "answers") if raw.get("answers") is not None else _answers(raw, key)
    if trained in right:
        right.remove(trained)
    return Conversation(_turns([(_asked(raw), trained)]), [(trained, *right)])


def read_choices(raw: dict) -> Conversation:
    """A multiple choice: the options follow the question, each after its letter, and the right letter is trained."""
    options = _options(raw)
    letter = _letter(raw["answer"], options)
    lines = [_asked(raw), *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options)), CHOICE_PROMPT]
    return Conversation(_turns([("\n".join(lines), letter)]), [(letter,)], options)


def read_completion(raw: dict) -> Conversation:
    """A prompt and its completion, each a text or messages (TRL)."""
    if isinstance(raw.get("label"), bool):
        return refuse_feedback(raw)
    messages = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = raw[key]
        messages += [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, key)
    return Conversation(messages)


def read_text(raw: dict) -> Conversation:
    """Text to go on with, which is trained whole; `<image>` shows where pictures stand."""
    return Conversation([{"role": "text", "content": _text(raw, "text")}])


def read_image_text(raw: dict) -> Conversation:
    """A picture's caption, as in `caption`, or where the text has a marker `<image>` as in `text`."""
    return read_text(raw) if isinstance(raw["text"], str) and MARKER.search(raw["text"]) else read_caption(raw)


def read_caption(raw: dict) -> Conversation:
    """A picture's caption, the answer to "describe the image."; of several the first is trained, all are right."""
    if not find_pictures(raw):
        raise UserError("a caption needs a picture: put it into image, or name its field by --data.fields image=...")
    key = next(k for k in ("caption", "captions", "text") if raw.get(k) is not None)
    captions = _answers(raw, key)
    return Conversation(_turns([(CAPTION_QUESTION, captions[0])]), [tuple(captions)])


def read_preference(raw: dict) -> Conversation:
    """A prompt and two answers, texts or messages (TRL, RLAIF-V): pairs for preferences, else the better is trained."""
    chosen, rejected = (_answer(raw, key) for key in ("chosen", "rejected"))
    key = next((key for key in PROMPTS if raw.get(key) is not None), None)
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations, whatever is beside them
        shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        prompt, chosen, rejected = chosen[: len(shared)], chosen[len(shared) :], rejected[len(shared) :]
        if not chosen and not rejected:
            prompt, chosen, rejected = prompt[:-1], prompt[-1:], prompt[-1:]
    elif key is None:
        raise UserError("chosen and rejected have no prompt beside them: name its column, as in --data.fields prompt=q")
    elif isinstance(raw[key], str):
        prompt = [{"role": "user", "content": raw[key]}]
    else:
        prompt = _messages(raw[key], key)
    roles = [[m["role"] if isinstance(m, dict) else None for m in answer] for answer in (chosen, rejected)]
    if roles != [["assistant"]] * 2:
        raise UserError("chosen and rejected must be one answer each to the same prompt, and these differ before that")
    if chosen == rejected:
        raise UserError("chosen and rejected are equal, so neither is better: leave the record out")
    return Conversation([*prompt, *chosen], rejected=rejected[0], ref_logprobs=_ref_logprobs(raw))


def refuse_feedback(_raw: dict) -> Conversation:
    """Refused, as a verdict on an answer is no pair; a better and a worse one can be named chosen and rejected."""
    raise UserError(
        "the record says that an answer is good or bad, and it is no pair: name the two answers, as in --data.fields "
        "prompt=query chosen=response rejected=rejected_response, or train the good ones by completion=..."
    )


def refuse_label(_raw: dict) -> Conversation:
    """Refused, as the number of a class says nothing; the name of the class can be trained as a caption or answer."""
    raise UserError(
        "the record has the label of a class: write the class's name, and train it by --data.fields caption=label (of "
        "a picture) or question=text answer=label (of a text)"
    )


# --- what layouts share ---------------------------------------------------------------------------------------


def _turns(pairs) -> list[dict]:
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # noqa: B905


def _messages(value, key: str) -> list:
    """Bring messages with from and value to role and content, and the names of the roles to ours."""
    if not isinstance(value, list):
        raise UserError(f"{key} must be a list, not {kind_of(value)}")
    messages = []
    for message in value:
        if isinstance(message, dict):
            if message.get("tool_calls"):
                raise UserError(f"{key} have calls of tools, which are not trained")
            if any(message.get(flag) in (False, 0) for flag in UNTRAINED if message.get(flag) is not None):
                raise UserError(
                    f"{key} leave answers out of training by {' or '.join(UNTRAINED)}; here all are trained"
                )
            role = message.get("role") if message.get("role") is not None else message.get("from")
            content = message.get("content") if message.get("content") is not None else message.get("value")
            refuse_in_turn(message, ("role", "content", "from", "value"))
            message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
        messages.append(message)
    return messages


def _answer(raw: dict, key: str) -> list:
    """Return an answer, a text or message, or a whole conversation that ends with it, as messages."""
    value = raw[key]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _messages([value] if isinstance(value, dict) else value, key)


def _ref_logprobs(raw: dict) -> tuple[float, float] | None:
    chosen, rejected = (raw.get(key) for key in REFERENCE)
    if chosen is None and rejected is None:
        return None
    numbers = [float(x) for x in (chosen, rejected) if isinstance(x, int | float) and -1e30 < x <= 0]
    if len(numbers) < 2:
        found = f"{str(chosen)[:20]} and {str(rejected)[:20]}"
        raise UserError(f"{' and '.join(REFERENCE)} must be two log-probabilities, at most 0, not {found}")
    return numbers[0], numbers[1]


def _history(raw: dict) -> list[tuple[str, str]]:
    history = [] if raw.get("history") is None else raw["history"]
    is_pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not is_pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise UserError("history must be a list of pairs of texts, a question and its answer")
    return [(question, answer) for question, answer in history]


def _asked(raw: dict) -> str:
    """Return the question, after what it is about."""
    if isinstance(raw.get("text"), str) and raw["text"].strip():
        raise UserError(
            "a text stands beside the question and would not be shown: --data.fields context=text puts it before the "
            "question, or leave it out"
        )
    about = [_text(raw, key) for key in ("context", "hint") if raw.get(key) not in (None, "")]
    return "\n".join([*about, _text(raw, "question")])


def _text(raw: dict, key: str) -> str:
    if not isinstance(raw[key], str):
        raise UserError(f"{key} must be a text, not {kind_of(raw[key])}")
    return raw[key]


def _answers(raw: dict, key: str) -> list[str]:
    """Return a text or number, or a list of them, as texts; items may be dicts with `answer` (VQAv2)."""
    value = _parse_list(raw[key], key) if key.endswith("s") else raw[key]
    if isinstance(raw[key], str) and isinstance(value, list) and not all(isinstance(x, str | dict) for x in value):
        value = raw[key]  # an interval or a box, which is one answer
    answers = []
    for item in value if isinstance(value, list) else [value]:
        item = item.get("answer") if isinstance(item, dict) else item
        is_number = isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 1e100
        if not isinstance(item, str) and not is_number:
            raise UserError(f"{key} must be a text or a list of texts, not {kind_of(item)}")
        answers.append(str(item))
    if not answers:
        raise UserError(f"{key} is an empty list: there is nothing to train")
    return answers


def _options(raw: dict) -> tuple[str, ...]:
    """Return the options of a multiple choice: a list, or the columns A, B, ... up to the first that is empty."""
    key = next((key for key in ("options", "choices") if raw.get(key) is not None), None)
    if key is None:
        values = []
        for letter in LETTERS:
            if raw.get(letter) in (None, "") or raw[letter] != raw[letter]:  # pandas writes NaN for nothing
                break
            values.append(raw[letter])
        key, value = "A, B, ...", values
    else:
        value = _parse_list(raw[key], key)
        if isinstance(value, dict) and "".join(map(str, value)) == LETTERS[: len(value)]:
            value = list(value.values())
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{key} must be a list of 2 to {len(LETTERS)} options")
    return tuple(_answers({key: value}, key))


def _parse_list(value, key: str):
    """Read a list that a cell of a table holds as a text, in the notation of JSON or Python."""
    if not isinstance(value, str) or not re.fullmatch(r"\s*\[.*\]\s*", value, flags=re.DOTALL):
        return value
    # numpy writes ['a' 'b'], which Python would join to 'ab'
    if len(value) < 20_000 and not re.search(r"['\"]\s+['\"]", value):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    raise UserError(f"{key} looks like a list and is none in the notation of JSON or Python: {value[:60]!r}")


def _letter(answer, options: Sequence[str]) -> str:
    """Return the letter of the right option, which is given as a letter, as an index from 0, or word for word."""
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    if not isinstance(answer, str | int) or isinstance(answer, bool):
        raise UserError(f"answer must be a letter, an index or the text of an option, not {kind_of(answer)}")
    answer = str(answer).strip()
    readings = {i for i, option in enumerate(options) if option.strip() == answer}
    if bare := re.fullmatch(r"\(?([A-Za-z])[).:]?", answer):
        readings.add(LETTERS.index(bare[1].upper()))
    elif re.fullmatch(r"[0-9]{1,2}", answer):
        readings.add(int(answer))
    readings = {i for i in readings if i < len(options)}
    if len(readings) != 1:
        problem = "can be more than one" if readings else "is none"
        raise UserError(
            f"the answer {answer[:60]!r} {problem} of the {len(options)} options: give its letter, its index from 0 or "
            "its words"
        )
    return LETTERS[readings.pop()]


LAYOUTS = {
    "texts": Layout(read_texts, ("texts",)),
    "messages": Layout(read_messages, ("messages",)),
    "conversations": Layout(read_conversations, ("conversations|conversation",)),
    "query": Layout(read_query, ("query", "response"), ("history",)),
    "instruction": Layout(read_instruction, ("instruction", "output"), ("input", "history")),
    "choices": Layout(read_choices, ("question", "options|choices|A", "answer"), ("context", "hint", *LETTERS)),
    "question": Layout(read_question, ("question", "answer|answers|multiple_choice_answer"), ("context", "hint")),
    "completion": Layout(read_completion, ("prompt", "completion")),
    "caption": Layout(read_caption, ("caption|captions",), rank=2),
    "image_text": Layout(read_image_text, ("text", "images|image|file_names|file_name"), rank=2),
    "text": Layout(read_text, ("text",), rank=3),
    "preference": Layout(read_preference, ("chosen", "rejected"), (*PROMPTS, *REFERENCE), rank=0),
    "feedback": Layout(refuse_feedback, ("rejected_response|kto_tag",), rank=0),
    "label": Layout(refuse_label, ("label", "images|image|file_names|file_name|text"), rank=2),
}  # fmt: skip


def recognise(raw: dict) -> str:
    """Return the layout that a record's keys tell; one without a value or picture does not count.

    Raises UserError that names the keys where no layout has them, and both layouts where two do.
    """
    found = {name: keys for name, layout in LAYOUTS.items() if (keys := _found(raw, layout))}
    if not found:
        raise UserError(
            f"no layout has the keys of this record: {list_keys(raw)}; name its columns, as in --data.fields "
            "image=... question=... answer=..., or write texts or messages (docs/records.md)"
        )
    best = min(LAYOUTS[name].rank for name in found)
    names = [name for name in found if LAYOUTS[name].rank == best]
    names = [name for name in names if not any(found[name] < found[other] for other in names)]
    if len(names) > 1:
        raise UserError(
            f"the record can be read as {' and as '.join(names)}: decide by --data.layout {names[0]}, or leave the "
            "other's keys out"
        )
    return names[0]


def is_conversation(raw: dict) -> bool:
    """Tell whether a record has more than a picture's caption, by its keys."""
    return any(layout.rank <= 1 and _found(raw, layout) for layout in LAYOUTS.values())


def _found(raw: dict, layout: Layout) -> set[str]:
    """Return the keys of a record by which a layout is told; none if it lacks one."""
    found = [{key for key in need.split("|") if _has_value(raw, key)} for need in layout.needs]
    return set().union(*found) if all(found) else set()


def _has_value(raw: dict, key: str) -> bool:
    """Tell whether a key holds something; writers of tables give `"images": []` to records without pictures, too."""
    return not is_empty(raw.get(key)) if key in PICTURE_KEYS else raw.get(key) is not None


def read_layout(raw: dict, name: str) -> Conversation:
    """Read a record in the named layout, with the system prompt that may be beside any of them.

    Raises UserError where a key is missing or holds something else.
    """
    layout = pick(LAYOUTS, name, "data.layout")
    if not _found(raw, layout):
        needs = ", ".join(need.replace("|", " or ") for need in layout.needs)
        raise UserError(f"the layout {name} needs {needs}; this record has the keys: {list_keys(raw)}")
    conversation = layout.read(raw)
    if raw.get("system") in (None, ""):
        return conversation
    messages = conversation.messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise UserError("the record has two system prompts, in system and in its first message: leave one of them out")
    return conversation._replace(messages=[{"role": "system", "content": _text(raw, "system")}, *messages])


def known_keys(name: str) -> set[str]:
    """Return the keys that a layout reads."""
    layout = LAYOUTS[name]
    return {"system"} | {key for need in (*layout.needs, *layout.also) for key in need.split("|")}


def table() -> list[str]:
    """Return the lines of the table of layouts in docs/records.md."""
    lines = ["| layout | told by the keys | is |", "|---|---|---|"]
    for name, layout in LAYOUTS.items():
        needs = ", ".join(" or ".join(f"`{key}`" for key in need.split("|")) for need in layout.needs)
        if also := [f"`{key}`" for key in layout.also if key not in LETTERS]:
            needs += f" (also {', '.join(also)})"
        text = " ".join((layout.read.__doc__ or "").split())
        lines.append(f"| `{name}` | {needs} | {text} |")
    return lines
