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

from nanovlm.errors import UserError

SEED, MAX_NEW_TOKENS = 0, 16
TIMEOUT, TRIES, WAIT = 120, 4, 2.0  # seconds for a reply, attempts, seconds before the second, doubled each time
LARGEST_REPLY = 2**20  # bytes
REFUSALS = (400, 413, 415, 422)  # say that one request is not taken, whoever sends it


class Refused(UserError):
    """Raised where a server takes this request from nobody, such as a prompt that is too long for its model."""


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


def complete_chat(address: str, body: dict, trouble: str = "the server at {} gives no reply", timeout=TIMEOUT) -> str:
    """Send the body of a request, with the key in OPENAI_API_KEY where it is set; return the text of the first choice.

    What a busy server refuses is asked again, up to four times. Raises UserError that has the server's own words,
    Refused where it is about this request alone.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has characters that are of no key: set it anew")
        headers["Authorization"] = f"Bearer {key}"
    url, kind = f"{address.rstrip('/')}/chat/completions", UserError
    for attempt in range(TRIES):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=timeout) as response:
                content = json.loads(response.read(LARGEST_REPLY))["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
        except urllib.error.HTTPError as error:
            refusal = f"{error.code} {error.reason}: {read_words(error)}"
            if error.code not in (408, 409, 429) and error.code < 500:
                kind = Refused if error.code in REFUSALS else UserError
                break
        except http.client.InvalidURL as error:
            raise UserError(f"{address!r} is no address: {error}") from error
        except (http.client.HTTPException, OSError) as error:
            refusal = f"{type(error).__name__}: {error}" if isinstance(error, http.client.HTTPException) else str(error)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            refusal = f"its reply is not that of chat completions ({type(error).__name__}: {error})"
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
