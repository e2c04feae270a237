"""A server in this process on an engine of the tests' own, one in a process of its own, and clients that misbehave."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque

import httpx2
import openai
import uvicorn

from nanovlm.infer.api import Limits
from nanovlm.infer.request import End, Request, Token, Usage
from nanovlm.infer.server import build_app
from nanovlm.infer.service import Service
from nanovlm.infer.worker import Worker
from nanovlm.serve import bind

DEADLINE = 20  # seconds after which a test gives up waiting


class FakeEngine:
    """Gives every row the next token of its script a step, while it has leave to."""

    def __init__(self, script, num_rows=2, pace=0.0):
        """`script(request, answer)` returns the tokens of an answer; a step takes `pace` seconds."""
        self.script, self.num_rows, self.pace = script, num_rows, pace
        self.rows: deque[list] = deque()  # [number, answer, tokens left, request, start]
        self.leave = threading.Event()
        self.leave.set()
        self.submitted, self.cancelled, self.breaks = [], [], False

    @property
    def is_idle(self):
        return not self.rows

    def submit(self, request: Request):
        number = len(self.submitted)
        self.submitted.append(request)
        for answer in range(request.num_answers):
            self.rows.append([number, answer, list(self.script(request, answer)), request, time.monotonic(), 0])
        return number

    def step(self):
        if self.breaks:
            raise RuntimeError("broken on purpose")
        events = []
        if not self.leave.wait(0.005):
            return self._late()
        time.sleep(self.pace)
        for row in list(self.rows)[: self.num_rows]:
            number, answer, left, request, _start, given = row
            if not left or given == request.sampling.max_new_tokens:
                events.append(self._end(row, "length" if left else "stop"))
                continue
            token, row[5] = left.pop(0), given + 1
            events.append(Token(number, answer, token, -1.0, ((token, -1.0),)))
        return events + self._late()

    def _late(self):
        late = [row for row in self.rows if row[3].timeout and time.monotonic() - row[4] > row[3].timeout]
        return [self._end(row, "timeout", "too late") for row in late]

    def _end(self, row, reason, message=""):
        self.rows.remove(row)
        seconds = time.monotonic() - row[4]
        return End(row[0], row[1], reason, message, Usage(len(row[3].prompt), 0, row[5], seconds, seconds))

    def cancel(self, number, answer=None, reason="cancelled", message=""):
        rows = [row for row in self.rows if row[0] == number and answer in (None, row[1])]
        self.cancelled += [(number, row[1], reason) for row in rows]
        return [self._end(row, reason, message) for row in rows]


class Running:
    """A server on a free port of this machine."""

    def __init__(self, port, service=None, engine=None):
        self.port, self.service, self.engine = port, service, engine
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options):
        options = {"api_key": "none", "max_retries": 0, "timeout": DEADLINE} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path="/v1/chat/completions", body=None, **options):
        if body is not None:
            options = {"content": json.dumps(body), "headers": {"content-type": "application/json"}} | options
        return httpx2.post(self.url + path, timeout=DEADLINE, **options)

    def get(self, path, **options):
        return httpx2.get(self.url + path, timeout=DEADLINE, **options)

    def connect(self, body: dict, path="/v1/chat/completions", buffer=None, length=None):
        """Send a request by hand; return the socket, from which nothing is read. Buffers of few bytes fill soon."""
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % (length or len(data)) + data)
        return sock


@contextlib.contextmanager
def running(processor, engine, buffer=None, host="127.0.0.1", **limits):
    """Serve an engine in a thread of this process."""
    worker = Worker(engine)
    service = Service(processor, worker, "tiny", Limits(**limits).validate(), num_rows=engine.num_rows, longest=8192)
    listening = bind("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    app = build_app(service, host)
    config = uvicorn.Config(app, loop="asyncio", http="h11", ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    worker.start()
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(listening.getsockname()[1], service, engine)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(DEADLINE)
        worker.stop()


@contextlib.contextmanager
def started(*options, command=("-m", "nanovlm.serve", "--port", "0", "--threads", "1")):
    """Run `python -m nanovlm.serve` in a process of its own; yield the server, with the process as `process`."""
    command = [sys.executable, *command, *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, (line, process.stderr.read())
        server = Running(int(found[1]))
        server.process = process
        yield server
    finally:
        process.kill()
        process.communicate()


def end(server, number=signal.SIGTERM):
    """Send a signal to a server's process; return its exit status and what it printed to stderr."""
    server.process.send_signal(number)
    _, errors = server.process.communicate(timeout=60)
    return server.process.returncode, errors


def wait_for(condition, seconds=DEADLINE):
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
    return result


def data_url(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def question(text, *images):
    """Messages with a text and images, given as PIL images or URLs."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(text="why?", *images, **fields):
    """The body of a request."""
    return {"model": "tiny", "messages": question(text, *images), "temperature": 0, **fields}


def read_events(data: bytes) -> list:
    """Parse the events of a stream that has ended."""
    body = data.partition(b"\r\n\r\n")[2]
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def read_all(sock) -> bytes:
    """Read an answer to its end."""
    data = bytearray()
    while not data.endswith(b"0\r\n\r\n"):
        block = sock.recv(2**16)
        assert block, bytes(data[-200:])
        data += block
    return bytes(data)
