"""The command lines on the pages are what their commands take: each is parsed, and its config validated."""

import dataclasses
import functools
import re
import runpy
import shlex
import types
import warnings

import pytest
import tyro

from nanovlm.command_line import parse_generate, parse_train
from nanovlm.errors import UserError
from nanovlm.presets import PRESETS
from nanovlm.train import init
from tests.test_docs import CURRENT, find_code, names, read

# A line goes on with a run that is there for its reader alone: this is what its command says here.
GOES_ON = "there is no run in {} to go on with; to begin one, name a preset first"
# Inline code that begins so names an option, and is no line to run.
NAMES_OPTION = re.compile(r"(train|generate)\.py --|(python -m nanovlm[.\w]*)$")
COMMAND = re.compile(r"(?:^|\s)((?:train|generate)\.py|-m nanovlm[.\w]*)(?=\s|$)(.*)")


def find_commands(text):
    """Yield each line that runs a command of nanovlm: the line, the script or the module, and its arguments."""
    for line in find_code(text):
        if re.match(r"(python|torchrun|train\.py [a-z]) *", line) and not NAMES_OPTION.match(line):
            if found := COMMAND.search(line):
                yield line, found[1].removeprefix("-m "), shlex.split(found[2], comments=True)


def wrong_commands(text):
    """Yield a line whose command does not take it, with what the command says."""
    for line, name, args in find_commands(text):
        try:
            problem = check(name, args)
        except (UserError, SystemExit) as error:
            problem = str(error)
        if problem:
            yield f"{line}: {problem}"


def check(name, args):
    """Parse the arguments of a command and validate what they say; return what is wrong beside that."""
    if name == "generate.py":
        parse_generate(args).validate()
    elif name != "train.py":
        return check_module(name, args)
    elif len(args) == 2 and args[0] == "--run-dir":
        with pytest.raises(UserError, match=GOES_ON.format(args[1])):
            parse_train(args)
    elif args[-1:] == ["--help"]:
        with pytest.raises(SystemExit) as end:
            parse_train(args)
        return end.value.code
    else:
        parse_train(args).validate()


def check_module(name, args):
    """Run a module as a command, up to where its arguments are read."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, as the module may be imported already
        patch.setattr("sys.argv", [name, *args])
        patch.setattr(tyro, "cli", functools.partial(only_parse, tyro.cli))
        try:
            runpy.run_module(name, run_name="__main__")
        except Parsed:
            return None
    return "it read no arguments"


class Parsed(Exception):
    """Raised where a command would begin."""


def only_parse(cli, wanted, **options):
    """Do what tyro.cli does, but call no function; then raise Parsed."""

    def stop(*args, **kwargs):
        raise Parsed

    is_config = dataclasses.is_dataclass(wanted)
    config = cli(wanted if is_config else functools.wraps(wanted)(stop), **options)
    getattr(config, "validate", lambda: None)()
    raise Parsed


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, where models that a line starts from are those of the presets that they come from."""

    def find_model(name):
        preset = "smolvlm_256m_stage3" if "smolvlm" in str(name).lower() else "scenes"
        return types.SimpleNamespace(config=PRESETS[preset]().model)

    monkeypatch.setattr(init, "find_model", find_model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_command_lines_are_what_their_commands_take(elsewhere, page):
    assert not list(wrong_commands(read(page)))


def test_most_commands_are_on_some_page():
    found = [name for page in CURRENT for _, name, _ in find_commands(read(page))]
    assert found.count("train.py") > 40 and found.count("generate.py") > 10
    assert len({name for name in found if name.startswith("nanovlm.")}) > 12


def test_what_is_wrong_is_noticed(elsewhere, capsys):
    lines = {
        "python train.py scenes --optim.lrx 1": "2",
        "python train.py nothing --optim.lr 1": "preset = 'nothing' is unknown",
        "python train.py scenes --optim.lr -1": "optim.lr = -1.0",
        "python train.py small --init.model x --objective reward --data.sources y": "model.has_score_head = False",
        "python train.py small --init.model x --run-dir z": "data.sources is empty",
        "torchrun --nproc-per-node 8 train.py smolvlm_256m_stage3 --parallel.strategy x": "2",
        "python generate.py --model x --num-answers 2": "--num-answers 2 needs a --prompt",
        "python -m nanovlm.hub.export runs/demo": "2",
        "python -m nanovlm.data.scenes x --split none  # comment": "2",
        "python -m nanovlm.errors x": "it read no arguments",
    }
    right = "python train.py scenes\n```\n`train.py --optim.lrx`"
    found = list(wrong_commands("\n".join(["```", *lines, right])))
    expected = [f"{line}: {said}" for line, said in lines.items()]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected
