"""Commands: watch for signals, and report a user's mistake in one sentence."""

import atexit
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from nanovlm.errors import UserError, printable

PROJECT = Path(__file__).resolve().parent.parent  # the checkout; site-packages where the wheel is installed
interrupts: list[int] = []  # of which `run` has raised KeyboardInterrupt; a program that goes on after one clears it


def end_on_interrupt():
    """Let Ctrl-C end the process with one line also before and between calls of `run`, where imports take seconds."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _end)


def _end(_number, _frame):
    os.write(sys.stderr.fileno(), b"\nstopped\n")
    os._exit(130)


def _interrupt(number, _frame):
    interrupts.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def watch_signals(*numbers: int):
    """Yield a list of the received signals of these numbers; by default of those that end a run of training.

    These are SIGTERM and SIGUSR1, by which a scheduler announces the end of a job, and SIGINT. None ends the process,
    as each may arrive twice: from the scheduler, and once more from torchrun. Only a second SIGINT, of a user who does
    not want to wait, raises KeyboardInterrupt.
    """
    seen, numbers = [], numbers or (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell sets it for what runs in the background
        numbers = tuple(number for number in numbers if number != signal.SIGINT)

    def note(number, _frame):
        if number == signal.SIGINT and number in seen:
            _interrupt(number, _frame)
        seen.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable):
    """Call main and return its result.

    A user's mistake and what the system refuses are printed as one sentence, with exit status 2. Any other error is a
    bug and keeps its traceback. Characters that the terminal cannot encode are printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler in (signal.default_int_handler, _end):
            signal.signal(signal.SIGINT, _interrupt)
        result = main()
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end(128 + signal.SIGPIPE)
    except (Exception, KeyboardInterrupt) as error:
        if interrupts or isinstance(error, KeyboardInterrupt):  # a library may make another error of it
            sys.unraisablehook = lambda _unraisable: None  # what is half made cannot always be deleted
            print("\nstopped", file=sys.stderr)
            end(130)
        if not isinstance(error, UserError | OSError) and not is_refused_by_kernels(error):
            raise
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{rank}error: {printable(str(error), most=4000)}", file=sys.stderr)
        end(2)
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        end(error.code)
    finally:
        interrupts.clear()
        if handler in (signal.default_int_handler, _end):
            signal.signal(signal.SIGINT, handler)


def run_command(args: list[str], commands: dict[str, tuple[type, Callable]], prog: str, description: str | None):
    """Run the command that the first argument names: of each, its config class and its function."""
    import tyro

    if not args or args[0] in ("-h", "--help"):
        print(description)
        return
    if args[0] not in commands:
        raise UserError(f"there is no command {args[0]!r}; there are {', '.join(commands)}")
    config, function = commands[args[0]]
    style = (tyro.conf.PositionalRequiredArgs,)
    function(tyro.cli(config, args=args[1:], prog=f"{prog} {args[0]}", description=function.__doc__, config=style))


def end(status: int):
    """End the process; one that torchrun started, without the interpreter's own end.

    The threads of gloo outlive destroy_process_group. One that drops the tensors of its last work when the interpreter
    is ending aborts the process, and torchrun starts a finished run again (torch 2.13, pytorch pull request 179291).
    """
    if "LOCAL_RANK" not in os.environ:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def is_refused_by_kernels(error: BaseException) -> bool:
    """Return whether a kernel refuses its inputs: as kernels import nothing of ours, they raise no UserError."""
    if not isinstance(error, ValueError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    kernels = Path(__file__).parent / "kernels"
    return Path(last.filename).resolve().parent == kernels.resolve() and (last.line or "").startswith("raise ")
