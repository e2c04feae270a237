"""A prompt -> the short reply of a judge, a language model on a server of the OpenAI API."""

import json
import os
import time
import urllib.error
import urllib.request

from nanovlm.errors import UserError

SEED, MAX_NEW_TOKENS = 0, 16
TIMEOUT, TRIES, WAIT = 120, 4, 2.0  # seconds for a reply, attempts, seconds before the second, doubled each time
LARGEST_REPLY = 2**20  # bytes


def ask_server(address: str, model: str, prompt: str) -> str:
    """Ask a server for a greedy, seeded reply; OPENAI_API_KEY, where set, goes with it.

    What a busy server refuses is asked again, up to four times. Raises UserError that has the server's own words.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": SEED,
        "max_tokens": MAX_NEW_TOKENS,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{address.rstrip('/')}/chat/completions"
    for attempt in range(TRIES):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content = json.loads(response.read(LARGEST_REPLY))["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
        except urllib.error.HTTPError as error:
            refusal = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (urllib.error.URLError, OSError) as error:
            refusal = str(error)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            refusal = f"its reply is not that of chat completions ({type(error).__name__}: {error})"
            break
        if attempt + 1 < TRIES:
            time.sleep(WAIT * 2**attempt)
    raise UserError(f"the judge at {url} gives no verdict: {refusal}")
