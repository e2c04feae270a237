"""Serve a model over HTTP, as OpenAI's API has it.

    python -m nanovlm.serve runs/demo/model
    python -m nanovlm.serve owner/name --port 8080 --quantize int4 --token-file token.txt --host 0.0.0.0
    python -m nanovlm.serve smolvlm-256m --adapter german=runs/german/adapter receipts=owner/name
    python -m nanovlm.serve runs/demo/model --allow-urls upload.wikimedia.org

Any client of that API can ask it: docs/serving.md has examples, limits and what it counts.
"""

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import asyncio
import importlib.util
import logging
import math
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from nanovlm.errors import UserError
from nanovlm.infer.api import Limits


@dataclass(frozen=True)
class ServeConfig:
    # A model folder, or owner/name on the hub.
    model: str
    # The name by which clients call it; the model as given above if empty.
    name: str = ""
    # The address to listen on. Any but this machine's own lets others in: set a token.
    host: str = "127.0.0.1"
    # 0 takes a free one.
    port: int = 8000
    # How many answers are made at a time.
    num_rows: int = 16
    # How many tokens the cache holds: of all prompts and answers at a time, and of prompts kept for others that begin
    # alike. 0 for what suits num_rows.
    cache_tokens: int = 0
    # What the cache keeps of each number of keys and values: itself, or a code of 8 or 4 bits, in a fraction of the
    # memory and nearly, in 4 bits not always, with the same answers.
    cache_format: Literal["float", "int8", "int4"] = "float"
    # What it takes on.
    limits: Limits = field(default_factory=Limits)
    # Seconds in which open requests may end at SIGTERM or Ctrl-C.
    grace: float = 30
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Precision of the weights; auto takes that of the file.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Quantise the decoder's linear layers to this format.
    quantize: Literal["none", "int8", "int4", "nf4", "fp8"] = "none"
    # Adapters of the model in PEFT's layout, each as name=FOLDER: clients call the model with an adapter by this name.
    adapter: tuple[str, ...] = ()
    # Compile the steps that make a token of each answer, before the first request; this takes a minute.
    compile: bool = False
    # What guesses the next tokens, which then are checked together: lookup (what followed the same words before) or a
    # smaller model with the same tokenizer. No answer changes.
    draft: str = ""
    # How many tokens it guesses at a time; 4 if not given.
    draft_tokens: int | None = None
    # Threads of the CPU; 0 for one a physical core.
    threads: int = 0

    def validate(self) -> "ServeConfig":
        """Return self, or raise UserError that names a value and what would be right."""
        self.limits.validate()
        for name, ok, right in (
            ("port", 0 <= self.port < 65536, "from 0 to 65535"),
            ("num_rows", self.num_rows >= 1, "at least 1"),
            ("cache_tokens", self.cache_tokens >= 0, "0 or more"),
            ("grace", 0 <= self.grace < float("inf"), "0 or more"),
            ("draft_tokens", self.draft_tokens is None or self.draft_tokens >= 1, "at least 1"),
            ("threads", self.threads >= 0, "0 or more"),
        ):
            if not ok:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be {right}")
        if self.draft_tokens is not None and not self.draft:
            raise UserError("--draft-tokens says how many tokens a --draft guesses: add it")
        return self


def main(config: ServeConfig):
    """Serve until SIGTERM or Ctrl-C. Raises UserError with one sentence for anything wrong with the options."""
    config.validate()
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f'{sys.executable} has no {", ".join(missing)}: pip install -c constraints.txt -e ".[serve]"')
    limits = read_token(config.limits)
    listening = bind(config.host, config.port)  # before what takes long, as it may be taken
    import torch
    from PIL import Image

    import nanovlm
    from nanovlm.config import QuantizationConfig
    from nanovlm.environment import choose_threads, find_device, keep_freed_memory
    from nanovlm.hub.adapters import attach_all
    from nanovlm.hub.draft import open_draft
    from nanovlm.infer.adapters import check_adapter, settle
    from nanovlm.infer.engine import Engine
    from nanovlm.infer.service import Service
    from nanovlm.infer.worker import Worker
    from nanovlm.model.inference import prepare
    from nanovlm.model.quantized import quantize

    keep_freed_memory()
    device = find_device(config.device)
    torch.set_num_threads(config.threads or choose_threads(device))
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = nanovlm.load(config.model, device, dtype)
    if config.quantize != "none":
        quantize(model, QuantizationConfig(config.quantize))
    settle(model)
    attach_all(model, config.adapter, config.model)
    names = [one.partition("=")[0] for one in config.adapter]
    for name in names:
        check_adapter(model, name)  # what no request could choose is told now
    if (config.name or config.model) in names:
        raise UserError(f"the model and an adapter are both called {config.name or config.model}: give --name")
    prepare(model, compiles=config.compile)
    draft = open_draft(config.draft, config.draft_tokens, model, processor)
    num_rows, cache_tokens = config.num_rows, config.cache_tokens
    engine = Engine(model, num_rows, cache_tokens, draft=draft, cache_format=config.cache_format)
    Image.MAX_IMAGE_PIXELS = limits.max_pixels  # PIL checks it, too
    service = Service(
        processor,
        Worker(engine),
        config.name or config.model,
        limits,
        num_rows=config.num_rows,
        longest=engine.longest,
        adapters=names,
    )
    run(service, listening, config.host, config.grace)


def read_token(limits: Limits) -> Limits:
    """Return the limits with the token that a file holds, if they name one."""
    if limits.token_file is None:
        return limits
    try:
        token = Path(limits.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the token file {limits.token_file} cannot be read: {error}") from error
    if not token:
        raise UserError(f"the token file {limits.token_file} is empty")
    return replace(limits, token=token, token_file=None).validate()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises UserError if it is taken, or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that has stopped reading is given up after so many milliseconds; connections inherit it.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
        listening.bind(address)
        listening.listen(2048)  # only from now on it is taken; who connects already waits
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listening


def run(service, listening: socket.socket, host: str, grace: float):
    """Serve on a bound socket until SIGTERM or Ctrl-C, and end what is open then; raise what the engine failed with."""
    import uvicorn

    from nanovlm.infer.server import build_app, is_loopback
    from nanovlm.infer.service import TELLING_SECONDS

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            self.should_exit |= bool(seen)  # a signal that came before this server watched for them
            place = f"[{host}]" if ":" in host else host
            print(f"{service.model} is served at http://{place}:{listening.getsockname()[1]}", flush=True)
            if not is_loopback(host) and not service.limits.token:
                print(f"anyone who reaches {host} can use it: --token-file FILE asks for a token", flush=True)

        async def on_tick(self, counter):
            return await super().on_tick(counter) or service.worker.failure is not None

        async def shutdown(self, sockets=None):
            ending = asyncio.create_task(self.end_requests(0 if service.worker.failure else grace))
            await super().shutdown(sockets)
            await ending

        async def end_requests(self, seconds: float):
            loop = asyncio.get_running_loop()
            latest = loop.time() + seconds + TELLING_SECONDS
            await service.close(seconds, lambda: self.force_exit)
            while self.server_state.connections and loop.time() < latest and not self.force_exit:
                await asyncio.sleep(0.05)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # its client does not read
            await asyncio.sleep(0.1)  # in which its handler hears of it

    config = uvicorn.Config(
        build_app(service, host),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace) + TELLING_SECONDS + 1,
    )
    # A client that does not read is given up amid its answer, which is no mistake of this server's.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing response" not in record.msg)
    service.worker.start()
    with cli.watch_signals() as seen:  # and have uvicorn watch for them in between
        try:
            Server(config).run([listening])
        finally:
            service.worker.stop()
    if service.worker.failure is not None:
        raise service.worker.failure


def command():
    """Run `python -m nanovlm.serve`, or the command nanovlm-serve."""
    import tyro  # only a command needs it

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    cli.run(lambda: main(tyro.cli(ServeConfig, description=__doc__, config=options)))


if __name__ == "__main__":
    command()
