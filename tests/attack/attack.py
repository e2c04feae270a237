"""Damaged and hostile inputs of every kind, each made from a seed: what reads them answers, or raises UserError.

    python -m tests.attack.attack                        5,000 inputs of each kind; prints what broke
    python -m tests.attack.attack images --seed 3        of one kind, from another seed
    python -m tests.attack.attack images --num 1 --seed 4711      one input again

An input may take a time and a memory, and raise nothing but UserError and OSError, whose message is printable. Records
are also counted: those that were read are documents, or are counted as lost. Input i of a kind follows from seed + i,
but for signals, where the clock decides what they meet.
"""

import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

import nanovlm
import train
from nanovlm import cli
from nanovlm.config import DataConfig, EvalConfig, InitConfig, OptimConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import decode_image
from nanovlm.data.loader import Loader
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import open_source, sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.train import checkpoint, resume
from nanovlm.train.log import open_metrics
from tests.conftest import TINY

SECONDS, MEMORY = 30, 2 * 2**30  # of one input, and beyond what the process has when it begins

ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\ud800",
    "\x1b[2J\x07",
    "\u202e",
    "<image>",
    "/dev/zero",
    "../../../etc/passwd",
    "file:///etc/passwd",
    "a" * 50_000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [[1, "x", None]],
]


# --- damage --------------------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut out, repeat, insert or overwrite some bytes, once to five times."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 50, 1000))
        kind = rng.choice(("flip", "flip", "cut", "drop", "repeat", "insert", "fill"))
        if kind == "flip" and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "fill":
            data[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * min(length, len(data) - at)
    return bytes(data)


def damage_json(rng: random.Random, value):
    """Replace one part of a JSON value, however deep, or drop, add or nest one."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.2:
            changed[rng.choice(("", "images", "texts", "messages", "\x1b[31m", "\ud800", key + "_"))] = changed.pop(key)
        else:
            changed[key] = damage_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], damage_json(rng, value[i]), *value[i + (rng.random() < 0.9) :]]
    if rng.random() < 0.1:
        for _ in range(rng.choice((1, 10, 900))):
            value = [value]
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 2, value * 10**6, value / 3, 2**31, 2**63, 2**64))
    return rng.choice(ODD_VALUES)


def damage_file(rng: random.Random, path: Path):
    path.write_bytes(damage_bytes(rng, path.read_bytes()))


# --- what is attacked ----------------------------------------------------------------------------------------


@dataclass
class Things:
    """Whole things to damage, made once."""

    folder: Path

    def __post_init__(self):
        self.processor = Processor(train_tokenizer(sample_texts(Scenes("train"), 50), 512), CHAT_TEMPLATE, TINY)
        torch.manual_seed(0)
        save_model(self.folder / "model", VLM(TINY), self.processor)
        self.records = []
        for i in range(6):
            picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8))
            picture.save(self.folder / f"{i}.png")
            turns = [{"user": f"what is {k}?", "assistant": f"it is {k}"} for k in range(1 + i % 3)]
            said = [{"role": role, "content": turn[role]} for turn in turns for role in ("user", "assistant")]
            form = {"texts": turns, "independent": i % 2 == 0} if i % 4 else {"messages": said}
            self.records.append({"images": [f"{i}.png"], **form})
        (self.folder / "good.jsonl").write_text("\n".join(map(json.dumps, self.records)))
        self.runner, self.whole, self.seconds = None, [], 0.0  # of the run that signals disturb


def read_all(things: Things, source, val_fraction: float):
    """Read a source through the loader, and count."""
    config = DataConfig(row_length=128, batch_rows=1, pack_buffer=4, max_bad_fraction=1.0, val_fraction=val_fraction)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        loader = Loader(
            source, lambda raw: things.processor.document(to_sample(raw)), config, TINY.pad_token_id, num_epochs=1
        )
        packed = sum(int((batch.doc_ids.unique() >= 0).sum()) for batches in loader for batch in batches)
    counts = loader.counts
    lost = sum(counts[kind] for kind in ("corrupt", "too long", "filtered", "other split"))
    assert counts["read"] == counts["documents"] + lost, counts
    assert packed == counts["documents"], (packed, counts)
    assert shown.getvalue().replace("\n", "").isprintable(), shown.getvalue()


def attack_jsonl(rng, things, folder):
    lines = [json.dumps(damage_json(rng, record) if rng.random() < 0.6 else record) for record in things.records]
    data = "\n".join(lines).encode()
    (folder / "a.jsonl").write_bytes(damage_bytes(rng, data) if rng.random() < 0.3 else data)
    for i in range(len(things.records)):
        shutil.copy(things.folder / f"{i}.png", folder)
    read_all(things, open_source(str(folder / "a.jsonl")), rng.choice((0.0, 0.5)))


def attack_tar(rng, things, folder):
    with tarfile.open(folder / "a.tar", "w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for i, record in enumerate(things.records):
            record = {key: value for key, value in record.items() if key != "images"}
            members = {"png": (things.folder / f"{i}.png").read_bytes(), "json": json.dumps(record).encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = bytearray((folder / "a.tar").read_bytes())
    if rng.random() < 0.6:  # a header that is wrong, with a sum that is right
        at = rng.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
        start, length = rng.choice(
            ((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155))
        )
        data[at + start : at + start + length] = rng.choice((b"\xff", b"\x80", b"7", b"\x00")) * length
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (folder / "a.tar").write_bytes(data if rng.random() < 0.5 else damage_bytes(rng, bytes(data)))
    read_all(things, open_source(str(folder / "a.tar")), rng.choice((0.0, 0.5)))


def attack_parquet(rng, things, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i, record in enumerate(things.records):
        turns = record.get("texts") or [{"user": "what?", "assistant": "this"}]
        rows.append({"images": [{"bytes": (things.folder / f"{i}.png").read_bytes(), "path": None}], "texts": turns})
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    damage_file(rng, folder / "a.parquet")
    read_all(things, open_source(str(folder / "a.parquet")), rng.choice((0.0, 0.5)))


def attack_images(rng, things, folder):
    mode = rng.choice(("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"))
    shape = (rng.randint(1, 40), rng.randint(1, 40))
    image = Image.fromarray(np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*shape, 3)).astype(np.uint8))
    image = (
        Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    )
    file = io.BytesIO()
    for kind in rng.sample(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "PCX"), k=11):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not every format has every mode
            image.save(file, kind)
            break
    decoded = decode_image(damage_bytes(rng, file.getvalue()) if rng.random() < 0.9 else file.getvalue(), "a picture")
    assert decoded.mode == "RGB"


PIECES = [
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.role }}",
    "<|{{ m.role }}|>",
    "<end_of_utterance>",
    "{{ m.nothing }}",
    "{{ m.content[0]['text'] }}",
    "{% for p in m.content %}{{ p.text }}{% endfor %}",
    "{{ messages | length }}",
    "{{ loop.index }}",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
    "{{ m | tojson }}",
    "{{ raise_exception('no') }}",
    "{{ m() }}",
    "{{ m.content.__class__.__mro__ }}",
    "{% include 'a' %}",
    "{% import os %}",
    "{{ ''.join(['a'] * 10 ** 8) }}",
    "{% break %}",
    "{% set x = namespace(n=0) %}{% set x.n = x.n + 1 %}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{{ m.content | upper }}",
    "{% if loop.last %}!{% endif %}",
    "<image>",
    "\x1b[2J",
    "{{ '%s' % m }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ m.content | replace('a', 'b') }}",
]


def attack_templates(rng, things, folder):
    body = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
    template = rng.choice(("{% for m in messages %}" + body + "{% endfor %}", CHAT_TEMPLATE + body, body))
    if rng.random() < 0.3:
        template = damage_bytes(rng, template.encode()).decode(errors="replace")
    processor = Processor(things.processor.tokenizer, template, TINY)
    raw = {**rng.choice(things.records), "images": [Image.new("RGB", (16, 16))]}
    document = processor.document(to_sample(raw))
    assert len(document.input_ids) == len(document.labels)
    processor.prompt([{"role": "user", "content": "what?"}])


def attack_models(rng, things, folder):
    shutil.copytree(things.folder / "model", folder / "model")
    file = folder / "model" / rng.choice(("config.json", "config.json", "tokenizer.json", "model.safetensors"))
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(json.dumps(damage_json(rng, json.loads(file.read_text()))))
    else:
        damage_file(rng, file)
    model, processor = nanovlm.load(folder / "model")
    nanovlm.generate(model, processor([{"role": "user", "content": "what?"}]), max_new_tokens=2)


def attack_gguf(rng, things, folder):
    from tests.hub import test_gguf

    if not (things.folder / "a.gguf").exists():
        tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), test_gguf.DECODER.vocab_size)
        test_gguf.write(things.folder / "a.gguf", test_gguf.make_model(), tokenizer)
    shutil.copy(things.folder / "a.gguf", folder)
    damage_file(rng, folder / "a.gguf")
    nanovlm.load(folder / "a.gguf")


def attack_runs(rng, things, folder):
    if not (things.folder / "run").exists():
        make_run(things.folder / "run")
    run = folder / "run"
    shutil.copytree(things.folder / "run", run)
    files, done = sorted(file for file in run.rglob("*") if file.is_file()), set()
    for _ in range(rng.randint(1, 3)):
        file = rng.choice(files)
        action = rng.random()
        if not file.is_file():
            continue
        if action < 0.15:
            file.unlink()
        elif action < 0.25:
            file.unlink()
            file.mkdir()
        elif file.suffix == ".json" and action < 0.6 and file not in done:
            file.write_text(json.dumps(damage_json(rng, json.loads(file.read_text()))))
        else:
            damage_file(rng, file)
        done.add(file)
    if rng.random() < 0.2:
        (run / "checkpoints" / rng.choice(("step_x", "step_00000099", ".step_00000001.tmp"))).touch()
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        checkpoints = resume.find_checkpoints(run)
        if checkpoints:
            model = VLM(TINY)
            state, _rng = checkpoint.load_checkpoint(checkpoints[-1], model, {})
            resume.check_same_config(run, TrainConfig(run_dir=str(run)), checkpoints)
            before = {name: x.clone() for name, x in model.state_dict().items()}
            assert all(torch.equal(x, Things.run_weights[name]) for name, x in before.items()), "other weights"
            open_metrics(run / "metrics.jsonl", state["step"]).close()
    assert shown.getvalue().replace("\n", "").isprintable(), shown.getvalue()


def make_run(run: Path):
    torch.manual_seed(0)
    model = VLM(TINY)
    Things.run_weights = {name: x.clone() for name, x in model.state_dict().items()}
    run.mkdir()
    resume.write_config(run / "config.json", TrainConfig(run_dir=str(run)), is_new=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 6)))
    for step in (3, 5):
        state = {"step": step, "threads": 1, "precision": "fp32", "slots": {}}
        checkpoint.Saving(run, model, {}, state, checkpoint.rng_state(), keep=2).finish()


def attack_signals(rng, things, folder):
    """Signals at random moments of a short run: it ends with a sentence, and goes on with the losses of a whole run."""
    try:
        if things.runner is None:
            things.runner = Runner(things)
            things.whole, things.seconds = finish_run(things, folder / "whole")
        child = things.runner.start(folder / "run")
        for _ in range(rng.choice((1, 1, 2, 3))):
            time.sleep(rng.uniform(0, things.seconds))
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(child, rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)))
        code, said = things.runner.wait(), (folder / "run.txt").read_text()
        # Saved; interrupted; or ended by a signal that it never watches for, or not before or after its steps.
        losses, expected = read_losses(folder / "run"), {0, 75, 130, -signal.SIGHUP}
        if not 0 < len(losses) < len(things.whole):
            expected |= {-signal.SIGTERM, -signal.SIGUSR1}
        assert code in expected, f"status {code} after {len(losses)} steps: {said}"
        assert "Traceback" not in said, said
        if code != 0:
            losses, _seconds = finish_run(things, folder / "run")
        assert losses == things.whole, "other losses"
    except BaseException as error:
        if things.runner is not None:  # it may wait for this run for ever, and what it says next is of this run
            things.runner.end()
            things.runner = None
        if isinstance(error, OSError):  # which other kinds may raise
            raise AssertionError(str(error)) from error
        raise


class Runner:
    """A process that has imported everything and forks a run when it is told to: an interpreter takes seconds.

    It runs nothing itself, so that it has no threads, whose locks a fork would find closed for ever.
    """

    def __init__(self, things):
        code = f"from pathlib import Path; from tests.attack import attack; attack.serve(Path({str(things.folder)!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.read("ready")

    def start(self, run: Path) -> int:
        """Start a run in this folder; return the number of its process."""
        self.process.stdin.write(f"{run}\n")
        self.process.stdin.flush()
        return self.read("process")

    def wait(self) -> int:
        """Return the exit status of the run, below 0 for a signal."""
        return self.read("status")

    def read(self, expected: str) -> int:
        name, number = self.process.stdout.readline().split()
        assert name == expected, f"{name} where {expected} was awaited"
        return int(number)

    def end(self):
        """End it with the run that it waits for."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def serve(folder: Path):
    """Fork a run for every folder named on standard input; print its process and, once it has ended, its status."""
    torch.set_num_threads(1)
    train.draw_curves = lambda _path: b""  # half of the time of so short a run
    child = fork_run(folder, folder / "first", then=lambda: (folder / "modules").write_text("\n".join(sys.modules)))
    os.waitpid(child, 0)
    for name in (folder / "modules").read_text().split():  # what a run imports on its way
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    print("ready", os.getpid(), flush=True)
    for line in sys.stdin:
        child = fork_run(folder, Path(line.strip()))
        print("process", child, flush=True)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def fork_run(folder: Path, run: Path, then: Callable = int) -> int:
    """Train in a fork of this process, which writes what it says to a file; return its number."""
    output, code = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
    if child := os.fork():
        os.close(output)
        return child
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        cli.run(lambda: train.main(short_run(folder, run)))
        then()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def short_run(folder: Path, run: Path) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        model=TINY,
        init=InitConfig(model=str(folder / "model")),
        data=DataConfig(sources=(str(folder / "good.jsonl"),), row_length=128, batch_rows=1, pack_buffer=4),
        optim=OptimConfig(steps=4),
        eval=EvalConfig(show_every=0),
        checkpoint_every=2,
        precision="fp32",
        threads=1,
    )


def finish_run(things, run: Path) -> tuple[list, float]:
    """Run to the end; return the losses and the seconds that it took."""
    begin = time.monotonic()
    things.runner.start(run)
    assert things.runner.wait() == 0, run.with_suffix(".txt").read_text()
    return read_losses(run), time.monotonic() - begin


def read_losses(run: Path) -> list[tuple]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in whole]


KINDS: dict[str, Callable] = {
    name.removeprefix("attack_"): function for name, function in list(globals().items()) if name.startswith("attack_")
}


# --- the judge -----------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """An input took longer than it may."""


@dataclass(frozen=True)
class AttackConfig:
    # Kinds of input; none for all.
    kinds: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    # Inputs of each kind.
    num: int = 5000
    # Seed of the first input.
    seed: int = 0


def try_one(kind: str, seed: int, things: Things) -> str:
    """Attack with one input; return what is wrong, or an empty text."""

    def stop(_number, _frame):
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            KINDS[kind](random.Random(seed), things, Path(folder))
    except (UserError, OSError) as error:
        return "" if str(error).isprintable() else f"a message that is not printable: {error!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.alarm(0)
    return ""


def main(config: AttackConfig) -> int:
    torch.set_num_threads(1)
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        things = Things(Path(folder))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
        for kind in config.kinds or KINDS:
            for seed in tqdm(range(config.seed, config.seed + config.num), desc=kind, mininterval=5):
                if wrong := try_one(kind, seed, things):
                    broken += 1
                    print(f"{kind} --num 1 --seed {seed}: {wrong}", flush=True)
    print(f"{broken} inputs broke something")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AttackConfig, description=__doc__)))
