"""The one thread that owns an engine: commands come in by a queue, events go out to the event loop.

```
event loop                                     engine's thread
submit, cancel, call  ---- queue of functions ----> run those, then one step, and again; sleep while idle
receive(event) of each listener  <---- events of a step, in one call_soon_threadsafe ----
```

Nothing waits for a listener: one that is slow to act on what it receives delays neither the engine nor the others.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from nanovlm.errors import UserError
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import End, Event, Request

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who asked for answers. All its methods run in the event loop."""

    def accept(self) -> None:
        """The engine has taken the request."""
        ...

    def receive(self, event: Event) -> None:
        """Take one event of the request."""
        ...

    def fail(self, error: Exception) -> None:
        """The request has ended: UserError if it can never be answered, else a fault of the engine."""
        ...


class Worker:
    """Runs an engine in a thread of its own."""

    def __init__(self, engine: Engine):
        self.engine = engine
        # What step or another method raised that it should not have: a bug. No request is answered any more.
        self.failure: Exception | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Of this thread alone: who listens to a request and for how many more ends, and which number a listener's has.
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, Listener]] = {}
        self._num_open: dict[int, int] = {}
        self._numbers: dict[Listener, int] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        """End all requests and the thread, and wait for that."""
        if self._thread.is_alive():
            self._commands.put(self._cancel_all)
            self._commands.put(None)
            self._thread.join()

    # --- called in the event loop ---------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener):
        """Queue a request, of which the listener hears."""
        loop = asyncio.get_running_loop()
        self._commands.put(lambda: self._submit(request, loop, listener))

    def cancel(self, listener: Listener, answer: int | None = None, reason: str = "cancelled"):
        """End a listener's request, or one answer of it, if it has not ended yet."""
        self._commands.put(lambda: self._cancel(listener, answer, reason))

    def cancel_all(self):
        self._commands.put(self._cancel_all)

    async def call(self, function: Callable, *args):
        """Return what a function returns that runs in the engine's thread, between two steps."""
        future = concurrent.futures.Future()

        def run():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except Exception as error:
                    future.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(future)

    # --- in the engine's thread -----------------------------------------------------------------------------------

    def _run(self):
        while True:
            is_waiting = self.failure is not None or self.engine.is_idle
            with contextlib.suppress(queue.Empty):
                while True:
                    command = self._commands.get(block=is_waiting)
                    if command is None:
                        return
                    self._guard(command)
                    is_waiting = False
            if self.failure is None and not self.engine.is_idle:
                self._guard(self._step)

    def _guard(self, function: Callable[[], None]):
        """Run a function; a bug in it ends all requests, and what the engine is from then on is not known."""
        try:
            function()
        except Exception as error:
            log.exception("the engine has failed")
            self.failure = error
            posts = [(loop, listener, error) for loop, listener in self._listeners.values()]
            for mapping in (self._listeners, self._num_open, self._numbers):
                mapping.clear()
            self._post(posts)

    def _submit(self, request: Request, loop: asyncio.AbstractEventLoop, listener: Listener):
        if self.failure is not None:
            self._post([(loop, listener, self.failure)])
            return
        try:
            number = self.engine.submit(request)
        except Exception as error:  # about this request alone: it has not reached the engine's rows
            if not isinstance(error, UserError):
                log.exception("a request cannot be queued")
            self._post([(loop, listener, error)])
            return
        self._listeners[number], self._num_open[number] = (loop, listener), request.num_answers
        self._numbers[listener] = number
        self._post([(loop, listener, None)])

    def _cancel(self, listener: Listener, answer: int | None, reason: str):
        number = self._numbers.get(listener)
        if number is not None:
            self._tell(self.engine.cancel(number, answer, reason))

    def _cancel_all(self):
        for number in list(self._listeners):
            self._tell(self.engine.cancel(number))

    def _step(self):
        self._tell(self.engine.step())

    def _tell(self, events):
        """Send events to their listeners, and forget requests of which all answers have ended."""
        posts = []
        for event in events:
            if event.request not in self._listeners:
                continue
            loop, listener = self._listeners[event.request]
            posts.append((loop, listener, event))
            if isinstance(event, End):
                self._num_open[event.request] -= 1
                if not self._num_open[event.request]:
                    del self._listeners[event.request], self._num_open[event.request], self._numbers[listener]
        self._post(posts)

    def _post(self, posts: list):
        """Have the event loops hand out (loop, listener, what): an event, an error, or None for an acceptance."""
        for loop in {loop for loop, _, _ in posts}:
            own = [(listener, what) for its, listener, what in posts if its is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                loop.call_soon_threadsafe(_hand_out, own)


def _hand_out(posts: list):
    for listener, what in posts:
        if what is None:
            listener.accept()
        elif isinstance(what, Exception):
            listener.fail(what)
        else:
            listener.receive(what)
