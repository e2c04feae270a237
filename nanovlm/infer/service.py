"""Body -> prompt -> reply: what the requests to a server share, its model, worker, limits and counts.

A request holds a place until its answer has ended, and its body a share of a number of bytes until it has become a
prompt. So what clients send has a bound in memory, whatever they do.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar
from urllib.parse import urlsplit

from PIL import Image
from starlette.types import Receive, Scope

from nanovlm.data.chat import Processor
from nanovlm.data.images import decode_image
from nanovlm.data.pictures import fetch
from nanovlm.data.source_address import download
from nanovlm.data.types import Document
from nanovlm.errors import UserError, printable
from nanovlm.infer.adapters import alone
from nanovlm.infer.api import ApiError, Ask, Limits
from nanovlm.infer.looking import look_response
from nanovlm.infer.metrics import SECONDS, TOKEN_SECONDS, Count, Gauge, Histogram, resident_bytes
from nanovlm.infer.replies import Reply
from nanovlm.infer.request import Request
from nanovlm.infer.token_bytes import TokenBytes
from nanovlm.infer.worker import Worker

BODY_SECONDS = 60  # in which a body has to come
NUM_DOWNLOADS = 4  # requests whose images are fetched at a time
SMALL_BODY = 2**16  # bytes; larger ones have to wait while as much as BODIES of the largest size is in memory
BODIES = 4
TELLING_SECONDS = 2  # for clients to be told that the server is shutting down
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Budget:
    """Bytes that the bodies of requests share. Who needs more than are left waits.

    The first does not: it can always end and give back what it has, so they never all wait for each other.
    """

    def __init__(self, total: int):
        self.left, self._freed = total, asyncio.Event()
        self._held: dict[object, int] = {}  # by whom, first come first

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], Awaitable[None]]]:
        """Yield a function that waits until so many bytes, in all, are held; they are given back on the way out."""
        holder = object()

        async def hold(size: int):
            held = self._held.setdefault(holder, 0)
            while self.left < size - held and holder is not next(iter(self._held)):
                self._freed.clear()
                await self._freed.wait()
            self.left -= size - held
            self._held[holder] = size

        try:
            yield hold
        finally:
            self.left += self._held.pop(holder, 0)
            self._freed.set()


class Service:
    """What all requests share: the model's processor, the engine's worker, limits and counts."""

    def __init__(
        self,
        processor: Processor,
        worker: Worker,
        model: str,
        limits: Limits,
        num_rows: int,
        longest: int,
        adapters: Sequence[str] = (),
    ):
        """`longest` is how many tokens a prompt and its answer may have. Clients ask for `model`, or for one of the
        `adapters` of it, which are models to them."""
        self.processor, self.worker, self.model, self.limits = processor, worker, model, limits
        self.models = (model, *adapters)
        self.num_rows, self.longest, self.created = num_rows, longest, int(time.time())
        self.token_bytes = TokenBytes(processor.tokenizer)
        self.longest_token = max(map(len, processor.tokenizer.get_vocab()))  # in characters
        # Whether new requests are refused, and whether those that are open have been ended.
        self.is_closing = self.is_closed = False
        self.num_open = 0
        self.budget = Budget((BODIES - 1) * limits.max_body)  # and what the first may take beyond it
        self.downloads = asyncio.Semaphore(NUM_DOWNLOADS)
        # One thread, as it decodes pictures: memory for one request at a time, and PIL's warnings are of a process.
        self.preparing = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self.downloading = ThreadPoolExecutor(NUM_DOWNLOADS, thread_name_prefix="download")
        # Time limits of requests that have no reply yet, by which these are ended; and replies.
        self.beginning: set[asyncio.Timeout] = set()
        self.replies: set[Reply] = set()
        self.statuses, self.answers = Count("path", "status"), Count("reason")
        self.prompt_tokens, self.cached_tokens, self.new_tokens = Count(), Count(), Count()
        self.drafted_tokens, self.accepted_tokens, self.gone = Count(), Count(), Count()
        self.first_token_s, self.answer_s = Histogram(SECONDS), Histogram(SECONDS)
        self.token_s = Histogram(TOKEN_SECONDS)
        self.metrics = {
            "nanovlm_http_responses_total": ("Responses by path and status.", self.statuses),
            "nanovlm_requests_open": ("Requests being read, waiting or being answered.", Gauge(lambda: self.num_open)),
            "nanovlm_requests_answering": ("Requests of which tokens have come.", Gauge(self._num_answering)),
            "nanovlm_clients_gone_total": ("Requests whose client went away.", self.gone),
            "nanovlm_answers_total": ("Answers by why they ended.", self.answers),
            "nanovlm_prompt_tokens_total": ("Tokens of prompts.", self.prompt_tokens),
            "nanovlm_cached_tokens_total": ("Tokens of prompts that were in the cache.", self.cached_tokens),
            "nanovlm_new_tokens_total": ("Tokens of answers.", self.new_tokens),
            "nanovlm_drafted_tokens_total": ("Tokens that were guessed.", self.drafted_tokens),
            "nanovlm_accepted_tokens_total": ("Guessed tokens that were right.", self.accepted_tokens),
            "nanovlm_first_token_seconds": ("From submission to the first token.", self.first_token_s),
            "nanovlm_token_seconds": ("A token after the first.", self.token_s),
            "nanovlm_answer_seconds": ("From submission to the end of an answer.", self.answer_s),
            "process_resident_memory_bytes": ("Memory of the process.", Gauge(resident_bytes)),
        }

    def _num_answering(self) -> int:
        return sum(any(answer.num_tokens for answer in reply.answers) for reply in self.replies)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place among the open requests. Raises ApiError if there is none."""
        if self.is_closing or self.worker.failure is not None:
            raise shutting_down()
        if self.num_open >= self.num_rows + self.limits.max_queue:
            message = f"{self.num_open} requests are waiting or being answered; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    async def close(self, grace: float, is_hurried: Callable[[], bool]):
        """Refuse new requests from now on, and end those that are open after so many seconds, or when it is hurried."""
        self.is_closing = True
        end = time.monotonic() + grace
        while self.num_open and time.monotonic() < end and not is_hurried():
            await asyncio.sleep(0.05)
        self.is_closed = True
        self.worker.cancel_all()
        for limit in self.beginning:
            if not limit.expired():
                limit.reschedule(0)
        end = time.monotonic() + TELLING_SECONDS
        while self.num_open and time.monotonic() < end:
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def time_limit(self, seconds: float, is_reply: bool = False) -> AsyncIterator[None]:
        """Raise ApiError in what runs within once it takes longer, or, unless it is a reply, once the server closes."""
        try:
            async with asyncio.timeout(seconds) as limit:
                if not is_reply:
                    self.beginning.add(limit)
                yield
        except TimeoutError as error:
            raise (shutting_down() if self.is_closed else ApiError(504, "the request took too long")) from error
        finally:
            self.beginning.discard(limit)

    # --- from a body to a prompt ------------------------------------------------------------------------------

    async def read_body(self, receive: Receive, size: int, hold: Callable[[int], Awaitable[None]]) -> bytes:
        """Return a body of at most `size` bytes; `hold` waits for room in memory. Raises ApiError, or ClientGone."""
        body, left = bytearray(), float(BODY_SECONDS)
        while True:
            start = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"the body did not come within {BODY_SECONDS} seconds") from error
            left -= time.monotonic() - start  # what it waits for others is not the client's time
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > size:
                raise self._too_large()
            if len(body) > SMALL_BODY:
                await hold(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def check_head(self, scope: Scope) -> int:
        """Return the largest size that the body may have. Raises ApiError for what is no JSON, or too large."""
        headers = {name: value for name, value in scope["headers"]}
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A page of another site cannot send this without being allowed to first.
        if kind != b"application/json":
            raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
        length = headers.get(b"content-length", b"")
        size = int(length) if length.isdigit() else self.limits.max_body
        if size > self.limits.max_body:
            raise self._too_large()
        return size

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.limits.max_body} bytes")

    def check_model(self, name: str):
        """Raise ApiError unless a name is that of the model or of an adapter."""
        if name not in self.models:
            shown = printable(name, most=100)
            message = f"there is no model {shown!r}; this server has {', '.join(map(repr, self.models))}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_size(self, ask: Ask):
        """Raise ApiError for longer answers than are allowed, or for more text than the longest tokens could hold.

        To tokenise such a text would take long, while nobody else's prompt is made and the interpreter is held.
        """
        num_tokens = ask.max_tokens or self.limits.max_new_tokens
        if ask.num_answers * num_tokens > self.limits.max_answer_tokens:
            message = (
                f"n = {ask.num_answers} and max_tokens = {num_tokens} ask for more than the "
                f"{self.limits.max_answer_tokens} tokens that the answers to a request may have together"
            )
            raise ApiError(400, message, "max_tokens")
        size, what = ask.num_characters, "the prompt has" if ask.text is not None else "the messages have"
        if size > self.longest * self.longest_token:
            message = f"{what} {size} characters, which are more than {self.longest} tokens"
        elif len(ask.messages) > self.longest:
            message = f"{len(ask.messages)} messages are more than {self.longest} tokens"
        else:
            return
        raise ApiError(400, message, ask.prompt_field, "context_length_exceeded")

    async def with_images(self, ask: Ask, make: Callable[[Ask, list[Image.Image]], T]) -> T:
        """Return what a function makes of a request and its images, which are fetched and decoded. Raises ApiError."""
        if len(ask.pictures) > self.limits.max_images:
            message = f"{len(ask.pictures)} images are more than the {self.limits.max_images} that are allowed"
            raise ApiError(400, message, "messages")
        loop = asyncio.get_running_loop()
        try:
            if not any(is_address(url) for url in ask.pictures):
                return await loop.run_in_executor(self.preparing, self._decode, ask, ask.pictures, make)
            async with self.downloads:
                pictures, size = [], 0
                for number, url in enumerate(ask.pictures, start=1):
                    if is_address(url):
                        args = self._fetch, url, f"image {number}", self.limits.max_body - size
                        pictures.append(await loop.run_in_executor(self.downloading, *args))
                        size += len(pictures[-1])
                    else:
                        pictures.append(url)
                return await loop.run_in_executor(self.preparing, self._decode, ask, pictures, make)
        except UserError as error:
            raise ApiError(400, str(error), ask.prompt_field) from error

    def _fetch(self, url: str, where: str, most: int) -> bytes:
        """Return what is at an address whose host is allowed."""
        try:
            host = urlsplit(url).hostname or ""
        except ValueError as error:
            raise UserError(f"{where} has an address that cannot be read: {error}") from error
        if host not in {allowed.lower() for allowed in self.limits.allow_urls}:
            hosts = ", ".join(self.limits.allow_urls) or "none: send a data: URL"
            raise UserError(f"{where} is at {printable(host, most=100)!r}, and the hosts that are allowed are {hosts}")
        return download(url, where, most_redirects=0, most_bytes=most, kind="image/")

    def _decode(self, ask: Ask, pictures: Sequence[str | bytes], make: Callable[[Ask, list[Image.Image]], T]) -> T:
        images, left = [], self.limits.max_pixels
        for number, picture in enumerate(pictures, start=1):
            data = fetch(picture, None) if isinstance(picture, str) else picture
            if not isinstance(data, bytes):
                raise UserError(f"image {number} is no data: URL of base64")
            images.append(decode_image(data, f"image {number}", left))
            left -= images[-1].width * images[-1].height
        return make(ask, images)

    def make_prompt(self, ask: Ask, images: list[Image.Image]) -> Document:
        """Return the prompt of a request. Raises UserError."""
        if ask.text is not None:
            return self.processor.text_prompt(ask.text)
        return self.processor.prompt(list(ask.messages), images)

    def make_prompt_to_look(self, ask: Ask, images: list[Image.Image]) -> tuple[Document, list[tuple[int, int]]]:
        """Return the prompt of a request and the sizes of its images. Raises UserError."""
        return self.make_prompt(ask, images), [image.size for image in images]

    async def look(self, ask: Ask, prompt: Document, sizes: list[tuple[int, int]]) -> dict:
        """Return what led to an answer, which the engine's thread computes between two steps. Raises ApiError."""
        self.check_room(ask, prompt)
        model = self.worker.engine.model

        def look():
            with alone(model, self.adapter_of(ask)):
                return look_response(model, self.processor, prompt, sizes, list(ask.answer_ids))

        try:
            return await self.worker.call(look)
        except UserError as error:
            raise ApiError(400, str(error), "answer_ids") from error

    def check_room(self, ask: Ask, prompt: Document) -> int:
        """Return how many tokens an answer to a prompt may have. Raises ApiError if it has no room."""
        if (room := self.longest - len(prompt)) < 1:
            message = (
                f"the prompt has {len(prompt)} tokens, and with its answer there is room for {self.longest}: shorten it"
            )
            raise ApiError(400, message, ask.prompt_field, "context_length_exceeded")
        return room

    def make_request(self, ask: Ask, prompt: Document, timeout: float) -> Request:
        """Return what the engine is asked; an answer without max_tokens gets what room there is, up to a limit.

        Raises ApiError where there is none.
        """
        room = self.check_room(ask, prompt)
        max_tokens = ask.max_tokens or min(room, self.limits.max_new_tokens)
        if max_tokens > room:
            message = (
                f"a prompt of {len(prompt)} tokens and max_tokens = {max_tokens} are more than the {self.longest} that "
                "there is room for: shorten the prompt or lower max_tokens"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        sampling = replace(ask.sampling, max_new_tokens=max_tokens)
        return Request(prompt, sampling, ask.num_answers, ask.num_logprobs, timeout, adapter=self.adapter_of(ask))

    def adapter_of(self, ask: Ask) -> str | None:
        return None if ask.model == self.model else ask.model

    # --- from the engine to the client ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open_reply(self, ask: Ask, request: Request) -> AsyncIterator[Reply]:
        """Submit a request and yield its reply once the engine has taken it; end it on the way out."""
        if self.is_closed:
            raise shutting_down()
        reply = Reply(self.processor, ask, len(request.prompt), self.worker)
        self.worker.submit(request, reply)
        self.replies.add(reply)
        try:
            while not reply.is_accepted:
                await reply.wait()
            yield reply
        finally:
            self.replies.discard(reply)
            if not reply.is_over:
                self.worker.cancel(reply)
            if reply.is_accepted:
                self._count(reply)

    def _count(self, reply: Reply):
        counts = reply.usage()
        self.prompt_tokens.add(counts["prompt_tokens"])
        self.cached_tokens.add(counts["prompt_tokens_details"]["cached_tokens"])
        self.new_tokens.add(counts["completion_tokens"])
        for answer in reply.answers:
            usage = answer.usage
            self.answers.add(1, answer.finish_reason or ("error" if reply.error else "gone"))
            self.drafted_tokens.add(usage.drafted_tokens)
            self.accepted_tokens.add(usage.accepted_tokens)
            if usage.first_token_s:
                self.first_token_s.add(usage.first_token_s)
                self.answer_s.add(usage.total_s)
            if usage.new_tokens > 1:
                self.token_s.add((usage.total_s - usage.first_token_s) / (usage.new_tokens - 1))


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", headers={"Connection": "close"})


def is_address(url: str) -> bool:
    return not url[:5].lower() == "data:"
