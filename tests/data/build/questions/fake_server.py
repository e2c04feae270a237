"""A server of the OpenAI API whose replies a function makes."""

import base64
import contextlib
import http.server
import io
import json
import threading
from collections.abc import Callable

from PIL import Image


class Seen:
    """What the server was sent: the bodies, and the Authorization of each."""

    def __init__(self):
        self.bodies, self.keys = [], []


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, some of many clients at once would wait a second


@contextlib.contextmanager
def serving(reply: Callable[[dict], str | tuple[int, str]], models: list[dict] | None = None):
    """Yield the address and what was seen.

    `reply(body)` is the text of an answer, or a status and a whole body; `models` is the list of them, if there is one.
    """
    seen = Seen()

    class Handler(http.server.BaseHTTPRequestHandler):
        wbufsize = -1  # head and body go together

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.bodies.append(body)
            seen.keys.append(self.headers.get("Authorization"))
            made = reply(body)
            status, text = made if isinstance(made, tuple) else (200, as_reply(made))
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):  # also what a redirect would become
            seen.keys.append(self.headers.get("Authorization"))
            if models is None or self.path != "/v1/models":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"object": "list", "data": models}).encode())

        def log_message(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()


def as_reply(text) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}]})


def text_of(body: dict) -> str:
    """Return the text of a request."""
    return body["messages"][-1]["content"][-1]["text"]


def picture_of(body: dict) -> Image.Image:
    """Return the picture of a request."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
