"""Prompts about pictures -> replies, by a model in a folder or on a server of the OpenAI API.

A reply of a model here depends on its prompt, pictures, seed and the options alone; a server must promise that itself.
A prompt that a server does not take, or always fails at, is Unusable; where it takes none, UserError ends the run,
which goes on when it is started again.
"""

import dataclasses
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from nanovlm.config import SamplingConfig
from nanovlm.config.fields import check
from nanovlm.data.build.records import Unusable
from nanovlm.data.build.settings import digest_weights
from nanovlm.data.chat import Processor
from nanovlm.data.pictures import to_url
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.infer.asking import answer_all
from nanovlm.infer.chat_client import Refused, Unavailable, complete_chat, describe_model
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.infer.text import after_thinking
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM


class Ask(NamedTuple):
    """One prompt: text about pictures, which stand before it, and what the reply must be."""

    text: str
    images: list[Image.Image]
    seed: int
    # The schema of the reply, which a server may be told; None where the reply is no JSON.
    schema: dict | None = None


MOST_IN_ROW = 8  # prompts that a server may fail at, one after the other
PLAINEST = Ask("Reply with the word yes.", [], 0)  # tells whether a server fails at a prompt or at all


class Writer(NamedTuple):
    """Who is asked, and what tells it from another model of the same name."""

    ask: Callable[[Sequence[Ask]], list[str | Unusable]]
    model: str


@dataclasses.dataclass(frozen=True)
class WriterOptions:
    # A model: a folder, a repository of the hub, a .gguf file; or the name of the one that a server at `address` has.
    model: str = ""
    # http://host:port/v1 of a server of the OpenAI API, ours included. The key in OPENAI_API_KEY goes with it.
    address: str = ""
    # Longest reply, in tokens; how it is chosen, 0 always taking the likeliest.
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    # How many prompts are asked at a time.
    num_rows: int = 16
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Seconds that a server has for a reply, and pixels of the longer side of the pictures that it gets; 0 for all.
    timeout: int = 120
    longest_side: int = 1024
    # Send the schema of the reply, where the server can keep a model to it (response_format).
    send_schema: bool = False

    def validate(self, name: str) -> "WriterOptions":
        """Return self, or raise UserError for the first contradiction; `name` is what the recipe calls the writer."""
        check(self.model, f"{name}.model is empty: name a model, or with {name}.address the one of a server")
        if self.address:
            parts = urllib.parse.urlsplit(self.address)
            is_plain = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
            check(is_plain, f"{name}.address = {self.address!r} must be as http://localhost:8000/v1")
            # The address is kept beside the data and shown in errors.
            check("@" not in parts.netloc, f"{name}.address must have no user or key in it: set OPENAI_API_KEY")
        for field, least in (("num_rows", 1), ("timeout", 1), ("longest_side", 0)):
            value = getattr(self, field)
            check(value >= least, f"{name}.{field} = {value} must be at least {least}")
        check(not self.send_schema or self.address, f"{name}.send_schema needs {name}.address: a server")
        self.sampling(0)
        return self

    def sampling(self, seed: int) -> SamplingConfig:
        found = SamplingConfig(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)
        return found.validate()


def open_writer(options: WriterOptions) -> Writer:
    """Return the writer that a recipe names; a model is read now."""
    if options.address:
        return Writer(lambda asked: ask_address(options, asked), describe_model(options.address, options.model))
    keep_freed_memory()
    model, processor = load(options.model, find_device(options.device))
    prepare(model)
    return Writer(lambda asked: ask_model(model, processor, options, asked), digest_weights(model))


def ask_model(model: VLM, processor: Processor, options: WriterOptions, asked: Sequence[Ask]) -> list[str | Unusable]:
    """Return a model's replies."""
    # A new engine each time, as what one has in its cache changes how sums are rounded.
    engine, places = Engine(model, options.num_rows), []
    replies: list[str | Unusable] = [Unusable("the prompt cannot be asked")] * len(asked)

    def requests() -> Iterator[Request]:
        for place, ask in enumerate(asked):
            try:
                request = Request(processor.prompt(as_messages(ask), ask.images), options.sampling(ask.seed))
                engine.check(request)
            except UserError:
                replies[place] = Unusable("the prompt is longer than the model can read")
                continue
            places.append(place)
            yield request

    for done in answer_all(engine, requests()):
        is_whole = done.end.reason == "stop"
        why = "the model has failed" if done.end.reason == "error" else "the reply is longer than max_new_tokens"
        replies[places[done.request]] = after_thinking(done.ids, processor) if is_whole else Unusable(why)
    return replies


def ask_address(options: WriterOptions, asked: Sequence[Ask]) -> list[str | Unusable]:
    """Return a server's replies. Raises UserError if it fails at so many prompts in a row, or at the plainest."""
    executor, replies, in_row = ThreadPoolExecutor(options.num_rows), [], 0
    failed: Unavailable | None = None
    try:
        for reply in executor.map(lambda ask: ask_once(options, ask), asked):
            replies.append(reply)
            cause = reply.__cause__ if isinstance(reply, Unusable) else None
            in_row = in_row + 1 if isinstance(cause, Unavailable) else 0
            failed = cause if isinstance(cause, Unavailable) else failed
            if in_row == MOST_IN_ROW:
                break
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    if failed and (in_row == MOST_IN_ROW or isinstance(ask_once(options, PLAINEST), Unusable)):
        raise failed
    return replies


def ask_once(options: WriterOptions, ask: Ask) -> str | Unusable:
    content: list[dict] = [{"type": "image_url", "image_url": {"url": show(options, image)}} for image in ask.images]
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": ask.text}]}],
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": ask.seed,
        "max_tokens": options.max_new_tokens,
    }
    if options.send_schema and ask.schema is not None:
        form = {"name": "reply", "schema": ask.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    try:
        return complete_chat(options.address, body, timeout=options.timeout)
    except (Refused, Unavailable) as error:
        is_refused = isinstance(error, Refused)
        reply = Unusable("the server refuses the prompt" if is_refused else "it gives no reply to the prompt")
        reply.__cause__ = error
        return reply


def show(options: WriterOptions, image: Image.Image) -> str:
    """Return a picture for a server: its pixels alone, without what its file says of place and time."""
    if options.longest_side and max(image.size) > options.longest_side:
        image = image.copy()
        image.thumbnail((options.longest_side, options.longest_side))
    plain = Image.new("RGB", image.size)
    plain.paste(image)
    return to_url(plain)


def as_messages(ask: Ask) -> list[dict]:
    """Return the one turn of a prompt; the text stays text, whatever markers it spells."""
    parts = [{"type": "image"} for _ in ask.images] + [{"type": "text", "text": ask.text}]
    return [{"role": "user", "content": parts}]
