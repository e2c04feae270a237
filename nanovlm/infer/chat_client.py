"""A chat -> the reply of a language model on a server of the OpenAI API.

The key in OPENAI_API_KEY goes to the server that the user names and to no other: a redirect is refused, and no message
shows the key, also where the server repeats it.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from nanovlm.errors import UserError

SEED, MAX_NEW_TOKENS = 0, 16
TROUBLE = "the server at {} gives no reply"
TIMEOUT, TRIES, WAIT = 120, 4, 2.0  # seconds for a reply, attempts, seconds before the second, doubled each time
LARGEST_REPLY = 2**20  # bytes
BUSY = (408, 409, 429)
IDENTITY = ("id", "root", "parent", "meta")  # what a list says of a model: root is its folder, meta its sizes
REFUSALS = (400, 413, 415, 422)  # say that one request is not taken, whoever sends it


class Refused(UserError):
    """Raised where a server takes this request from nobody, such as a prompt that is too long for its model."""


class Unavailable(UserError):
    """Raised where a server fails at a request each time that it is asked, or cannot be reached."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another server."""

    def redirect_request(self, *_args):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def ask_server(address: str, model: str, prompt: str) -> str:
    """Ask a server for a judge's reply, greedy, seeded and short; raises UserError as `complete_chat` does."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": SEED,
        "max_tokens": MAX_NEW_TOKENS,
    }
    return complete_chat(address, body, "the judge at {} gives no verdict")


def complete_chat(address: str, body: dict, trouble: str = TROUBLE, timeout=TIMEOUT) -> str:
    """Send the body of a request, with the key in OPENAI_API_KEY where it is set; return the text of the first choice.

    Raises what `send` does.
    """
    content = send(address, "chat/completions", body, lambda x: x["choices"][0]["message"]["content"], trouble, timeout)
    return content if isinstance(content, str) else ""


def describe_model(address: str, model: str) -> str:
    """Return what a server's list of models says of one, or of all if that is not among them; "" if it has no list.

    Raises Unavailable. What differs from one start of the server to the next is left out.
    """

    def read(data) -> list[dict]:
        found = [{name: entry.get(name) for name in IDENTITY} for entry in data["data"]]
        return [entry for entry in found if entry["id"] == model] or found

    try:
        return json.dumps(send(address, "models", None, read), sort_keys=True)
    except Unavailable:
        raise
    except UserError:
        return ""


def send(address: str, path: str, body: dict | None, read: Callable, trouble: str = TROUBLE, timeout=TIMEOUT):
    """Post the body of a request, or get what is there, and return what `read` makes of the JSON in the reply.

    What a busy server refuses is asked again, up to four times. Raises UserError that has the server's own words,
    Refused where it is about this request alone, Unavailable where the server fails at it.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has characters that are of no key: set it anew")
        headers["Authorization"] = f"Bearer {key}"
    url, kind = f"{address.rstrip('/')}/{path}", UserError
    for attempt in range(TRIES):
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=timeout) as response:
                return read(json.loads(response.read(LARGEST_REPLY)))
        except urllib.error.HTTPError as error:
            refusal = f"{error.code} {error.reason}: {read_words(error)}"
            has_failed = error.code >= 500 and error.code != 501  # which says that it does not do this
            kind = Unavailable if has_failed else Refused if error.code in REFUSALS else UserError
            if not has_failed and error.code not in BUSY:
                break
        except http.client.InvalidURL as error:
            raise UserError(f"{address!r} is no address: {error}") from error
        except (http.client.HTTPException, OSError) as error:
            kind = Unavailable
            refusal = f"{type(error).__name__}: {error}" if isinstance(error, http.client.HTTPException) else str(error)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            kind = UserError
            refusal = f"its reply is not that of {path.replace('/', ' ')} ({type(error).__name__}: {error})"
            break
        if attempt + 1 < TRIES:
            time.sleep(WAIT * 2**attempt)
    shown = (refusal.replace(key, "[key]") if key else refusal)[:500]
    raise kind(f"{trouble.format(url)}: {shown}")


def read_words(error: urllib.error.HTTPError) -> str:
    """Return what a server says beside its status, as far as it comes."""
    try:
        return error.read(4096).decode(errors="replace")
    except (http.client.HTTPException, OSError):
        return ""
