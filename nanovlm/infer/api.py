"""OpenAI's JSON -> a checked request, and mistakes -> OpenAI's errors.

A request is a stranger's. Every field is checked; one that is unknown, or would change the answer and is not built, is
refused in one sentence, so that nobody takes an answer for what it is not.
"""

import difflib
import json
import math
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError, printable

MOST_ANSWERS, MOST_LOGPROBS, MOST_STOPS, LONGEST_STOP = 64, 20, 4, 256
MOST_VALUES = 200_000  # of a body: millions of small ones take seconds to be parsed, in which nobody is answered
COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as in OpenAI's
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop",
          "stream", "stream_options", "logprobs", "return_token_ids"}  # fmt: skip
# Fields that say nothing about the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
           "safety_identifier", "parallel_tool_calls", "prediction"}  # fmt: skip
# Fields that are not built, with the values that ask for nothing.
UNSUPPORTED = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prune_image_tokens": (0,),  # prune.py says why
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    # A token that clients have to send, as "Authorization: Bearer TOKEN"; or a file with it, which no list of processes
    # shows.
    token: str | None = None
    token_file: Path | None = None
    # Hosts from which images may be fetched, such as upload.wikimedia.org; without any, images are data: URLs.
    allow_urls: tuple[str, ...] = ()
    # Largest body of a request, and largest sum of the images that it has fetched.
    max_body_mb: float = 32
    # Largest number of images of a request, and of their pixels in all.
    max_images: int = 16
    max_pixels: int = 40_000_000
    # Requests that may wait beside those that are being answered; further ones are refused with status 429.
    max_queue: int = 128
    # Seconds for a request, from its beginning to the end of its answer.
    timeout: float = 600
    # Largest number of tokens of an answer where the request gives none.
    max_new_tokens: int = 512
    # Largest number of tokens of all answers to a request together.
    max_answer_tokens: int = 65536

    def validate(self) -> "Limits":
        """Return self, or raise UserError that names the value and what would be right."""
        for name, ok, right in (
            ("max_body_mb", 0 < self.max_body_mb < math.inf, "above 0"),
            ("max_images", self.max_images >= 0, "0 or more"),
            ("max_pixels", self.max_pixels >= 1, "at least 1"),
            ("max_queue", self.max_queue >= 0, "0 or more"),
            ("timeout", 0 < self.timeout < math.inf, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "max_answer_tokens",
                self.max_answer_tokens >= self.max_new_tokens,
                f"at least max_new_tokens = {self.max_new_tokens}",
            ),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)} must be {right}")
        for host in self.allow_urls:
            if not host or any(character in host for character in "/:@*"):
                raise UserError(f"--allow-urls takes names of hosts, such as upload.wikimedia.org, not {host!r}")
        if self.token is not None and self.token_file is not None:
            raise UserError("give --token or --token-file, not both")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise UserError("a token must be ASCII without white space, of at least one character")
        return self

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * 2**20)


class ApiError(Exception):
    """A refusal with its HTTP status, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": printable(self.message, most=4000), "type": kind, "param": self.param}
            | {"code": self.code}
        }


@dataclass(frozen=True)
class Ask:
    """A checked request."""

    model: str
    # For Processor.prompt, and the URLs of the pictures that its image parts show, in order; or a plain text.
    messages: tuple[dict, ...]
    pictures: tuple[str, ...]
    text: str | None
    # Its max_new_tokens holds only where max_tokens is a number.
    sampling: SamplingConfig
    max_tokens: int | None
    num_answers: int
    stop: tuple[str, ...]
    num_logprobs: int | None
    tells_tokens: bool
    is_streamed: bool
    includes_usage: bool
    # Of an answer that is looked into.
    answer_ids: tuple[int, ...] = ()

    @property
    def prompt_field(self) -> str:
        """The field that holds what is answered."""
        return "messages" if self.text is None else "prompt"

    @property
    def num_characters(self) -> int:
        """Of all texts."""
        if self.text is not None:
            return len(self.text)
        contents = [message["content"] for message in self.messages]
        return sum(
            len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
            for content in contents
        )


def parse_json(body: bytes) -> dict:
    """Return the object that a body holds. Raises ApiError for anything else."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:  # base64 has none of these
        raise ApiError(400, f"the body has more than {MOST_VALUES} commas and brackets, and so too many values")
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    return data


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


def read_chat(data: dict) -> Ask:
    """Check a request of /v1/chat/completions. Raises ApiError with status 400."""
    data = _known(data, SHARED | {"messages", "max_completion_tokens", "top_logprobs"})
    messages, pictures = read_messages(data.get("messages"))
    num_logprobs = None
    if _flag(data, "logprobs"):
        num_logprobs = _whole(data, "top_logprobs", 0, 0, MOST_LOGPROBS)
    elif data.get("top_logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs = true", "top_logprobs")
    max_tokens = _whole(data, "max_tokens", None, 1)
    max_tokens = _whole(data, "max_completion_tokens", max_tokens, 1)
    return _ask(data, max_tokens, num_logprobs, messages=messages, pictures=pictures, text=None)


def read_completion(data: dict) -> Ask:
    """Check a request of /v1/completions. Raises ApiError with status 400."""
    data = _known(data, SHARED | {"prompt"})
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        raise ApiError(400, "prompt must be a text that is not empty: one prompt a request, and no token ids", "prompt")
    num_logprobs = _whole(data, "logprobs", None, 0, MOST_LOGPROBS)
    max_tokens = _whole(data, "max_tokens", COMPLETION_TOKENS, 1)
    return _ask(data, max_tokens, num_logprobs, messages=(), pictures=(), text=prompt)


def read_look(data: dict) -> Ask:
    """Check a request of /v1/look: a conversation as of a chat, and the tokens of an answer to it."""
    data = _known(data, {"model", "messages", "answer_ids"})
    ids = data.pop("answer_ids", None)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        message = "answer_ids must be a list of at least one token id, such as return_token_ids gives"
        raise ApiError(400, message, "answer_ids")
    return replace(read_chat(data), answer_ids=tuple(ids))


def _known(data: dict, known: set[str]) -> dict:
    """Return the fields that are used and not null; refuse what is unknown or not built."""
    for name, value in data.items():
        if value is None or name in known or name in IGNORED:
            continue
        shown = printable(name, most=60)
        if name not in UNSUPPORTED:
            nearest = "".join(f"; the nearest is {x!r}" for x in difflib.get_close_matches(name[:60], known, n=1))
            raise ApiError(400, f"there is no field {shown!r}{nearest}", shown, "unknown_parameter")
        if not any(type(value) in (type(neutral), int, float) and value == neutral for neutral in UNSUPPORTED[name]):
            raise ApiError(400, f"{shown} is not supported by this server", shown, "unsupported_parameter")
    return {name: value for name, value in data.items() if value is not None and name in known}


def _ask(data: dict, max_tokens: int | None, num_logprobs: int | None, **prompt) -> Ask:
    model = data.get("model")
    if not isinstance(model, str):
        raise ApiError(400, "model must be the name of the model, as /v1/models lists it", "model")
    options = data.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options must be an object that has include_usage alone", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    if options and not data.get("stream"):
        raise ApiError(400, 'stream_options says how to stream: it needs "stream": true', "stream_options")
    seed = _whole(data, "seed", None)
    top_k = _whole(data, "top_k", 0)
    try:
        sampling = SamplingConfig(
            max_new_tokens=max_tokens or 1,
            temperature=_number(data, "temperature", 1.0),
            top_k=0 if top_k == -1 else top_k,
            top_p=_number(data, "top_p", 1.0),
            min_p=_number(data, "min_p", 0.0),
            repetition_penalty=_number(data, "repetition_penalty", 1.0),
            seed=secrets.randbits(48) if seed is None else seed % 2**62,  # room for one seed an answer
        ).validate()
    except UserError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from error
    return Ask(
        model=model,
        sampling=sampling,
        max_tokens=max_tokens,
        num_answers=_whole(data, "n", 1, 1, MOST_ANSWERS),
        stop=_stops(data.get("stop")),
        num_logprobs=num_logprobs,
        tells_tokens=_flag(data, "return_token_ids"),
        is_streamed=_flag(data, "stream"),
        includes_usage=_flag(options, "include_usage"),
        **prompt,
    )


def _number(data: dict, name: str, default: float) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(400, f"{name} must be a number", name)
    try:
        return float(value)
    except OverflowError as error:
        raise ApiError(400, f"{name} is too large", name) from error


def _whole(data: dict, name: str, default, least: int | None = None, most: int | None = None):
    """Return a whole number within limits, or the default where the field is absent."""
    if name not in data:
        return default
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{name} must be a whole number", name)
    if least is not None and value < least:
        raise ApiError(400, f"{name} = {value} must be at least {least}", name)
    if most is not None and value > most:
        raise ApiError(400, f"{name} = {value} must be at most {most}", name)
    return value


def _flag(data: dict, name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return value


def _stops(stop) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    is_list = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not is_list or not all(isinstance(x, str) and 0 < len(x) <= LONGEST_STOP for x in stops):
        message = f"stop must be a text or at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters"
        raise ApiError(400, message, "stop")
    return tuple(stops)


def read_messages(messages) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """Return messages for Processor.prompt, and the URLs of the pictures that their image parts show."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    read, pictures = [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"{where} must have a role that is one of {', '.join(ROLES)}", where)
        # What an answer carried, such as "refusal": null, may come back.
        _refuse_others(message, ("role", "content", "name"), f"{where} has", where)
        read.append({"role": ROLES[role], "content": _content(message.get("content"), role, where, pictures)})
    if read[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return tuple(read), tuple(pictures)


def _content(content, role: str, where: str, pictures: list[str]):
    """Return a text or a list of parts; add the URLs of its images to `pictures`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where}.content must be a text or a list of parts", where)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _refuse_others(part, ("type", "text"), f"{where} has a part of text with", where)
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url" and role == "user":
            _refuse_others(part, ("type", "image_url"), f"{where} has an image part with", where)
            url = part.get("image_url")
            if isinstance(url, dict):
                known = ("url", "detail") if url.get("detail") == "auto" else ("url",)
                _refuse_others(url, known, f"{where} has an image_url with", where)
                url = url.get("url")
            if not isinstance(url, str) or not url[:8].lower().startswith(("data:", "http://", "https://")):
                raise ApiError(400, f"{where}: image_url.url must be a data:, http:// or https:// URL", where)
            pictures.append(url)
            parts.append({"type": "image"})
        else:
            kinds = "text or, of a user's message, image_url"
            raise ApiError(400, f"{where} has a part that is not supported: its type must be {kinds}", where)
    return parts


def _refuse_others(fields: dict, known: tuple[str, ...], what: str, where: str):
    """Refuse fields that are not known, unless they say nothing."""
    for name, value in fields.items():
        if name not in known and value not in (None, [], {}, ""):
            raise ApiError(400, f"{what} {printable(name, most=60)!r}, which is not supported", where)
