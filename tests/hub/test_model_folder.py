"""What is saved comes back, and nothing half-written is ever taken for whole."""

import dataclasses
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nanovlm
from nanovlm.files import lock, write_file
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_document


@pytest.fixture
def folder(tmp_path, processor):
    torch.manual_seed(1)
    save_model(tmp_path / "model", VLM(TINY), processor)
    return tmp_path / "model"


def test_whoever_may_read_one_file_may_read_all(folder):
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert set(modes.values()) == {modes["config.json"]} and "model.safetensors" in modes


@torch.no_grad()
def test_a_model_comes_back(folder, processor):
    torch.manual_seed(1)
    original = VLM(TINY)
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])
    model, loaded = nanovlm.load(folder)
    assert torch.equal(model.logits(batch), original.logits(batch))
    assert model.config == TINY
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.to_str() == processor.tokenizer.to_str()
    assert not model.training
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        nanovlm.load(folder)


LOAD = """
import sys, torch
from pathlib import Path
from nanovlm.tensor_files import copy_tensors
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
before = resident("VmRSS")
places = {f"t{i}": [torch.empty(2**20), torch.empty(2**20)] for i in range(12)}
copy_tensors(places, [Path(sys.argv[1])])
assert all((part == i).all() for i in range(12) for part in places[f"t{i}"])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_no_second_copy(tmp_path):
    """Not even of a file in one piece, whose pages count as long as it is open."""
    save_file({f"t{i}": torch.full((2**21,), float(i)) for i in range(12)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.4 * 12 * 2**23


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_cut_off_weights_are_named(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut off"):
        nanovlm.load(folder)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vision"].update(hiden_size=3), "unknown field 'vision.hiden_size'; .* 'vision.hidden_size'"),
        (lambda c: c["vision"].update(patch_size=5), "scale_factor = 2 must divide .*image_size // .*patch_size = 3"),
        (lambda c: c["vision"].update(patch_size=17), "vision.patch_size = 17 is above vision.image_size = 16"),
        (lambda c: c["decoder"].update(hidden_size="32"), "decoder.hidden_size must be int, got '32'"),
        (lambda c: c["decoder"].update(attention="fast"), r"decoder.attention = 'fast' is unknown; there are sdpa"),
        (lambda c: c.update(image_token_id=2), "eos_token_id = 2 must differ from image_token_id = 2"),
        (
            lambda c: c["decoder"].update(hidden_size=64),
            r"decoder.norm.weight has shape \[32\], the config says \[64\]",
        ),
        (lambda c: c["decoder"].update(num_hidden_layers=3), r"decoder.layers.2.mlp.up_proj.weight is missing"),
        (lambda c: c["decoder"].update(num_hidden_layers=1), r"decoder.layers.1.mlp.up_proj.weight is unknown"),
        (lambda c: c["decoder"].update(vocab_size=100), "needs 409 embeddings, more than decoder.vocab_size = 100"),
        (lambda c: c.update(eos_token_id=400), "eos_token_id = 400 is not a special token"),
    ],
)
def test_a_wrong_config_is_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        nanovlm.load(folder)


def test_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match=r"config.json is not readable JSON"):
        nanovlm.load(folder)
    with pytest.raises(ValueError, match="there is no model folder"):
        nanovlm.load(folder / "nothing")


def test_a_failed_write_leaves_what_was_there(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanovlm.hub.model_folder.save_file", fail)
    with pytest.raises(OSError, match=r"could not write .*model: .*No space left on device"):
        save_model(folder, nanovlm.load(folder)[0], nanovlm.load(folder)[1])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_file_system_may_flush_files_alone(folder, monkeypatch):
    """As shared folders of virtual machines do; what it says of a file is still an error."""
    flush, refused = os.fsync, stat.S_ISDIR

    def refuse(descriptor):
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save_model(folder, *nanovlm.load(folder))
    refused = stat.S_ISREG
    with pytest.raises(OSError, match=r"could not write .*Invalid argument"):
        write_file(folder / "a.json", "{}")
    assert not (folder / "a.json").exists()


def test_a_file_too_large_for_the_disk(folder):
    """The system itself refuses to write on, in the middle of the weights."""
    script = f"""
import resource, sys
import nanovlm
from nanovlm.hub.model_folder import save_model
from pathlib import Path
model, processor = nanovlm.load({str(folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_model(Path({str(folder)!r}), model, processor)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"could not write {folder}" in done.stdout
    nanovlm.load(folder)


def test_a_kill_between_the_renames_loses_nothing(folder):
    model, processor = nanovlm.load(folder)
    folder.rename(folder.with_name(".model.old"))
    nanovlm.load(folder)
    assert [p.name for p in folder.parent.iterdir()] == [".model.old"]  # it may be another process that is at work
    save_model(folder, model, processor)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_loading_touches_nothing(folder, monkeypatch):
    """Neither a copy that someone put beside the model nor, by a relative name, anything else."""
    shutil.copytree(folder, folder.with_name(".model.old"))
    monkeypatch.chdir(folder)
    nanovlm.load(".")
    assert sorted(p.name for p in folder.parent.iterdir()) == [".model.old", "model"]


def test_a_run_that_has_not_ended_says_how_to_go_on(folder):
    (folder.parent / "checkpoints").mkdir()
    (folder.parent / "config.json").write_text('{"checkpoint_every": 100}')
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ValueError, match="a run that has not ended, so it has no model yet; to go on with it: "):
        nanovlm.load(folder.parent)


def test_the_folder_of_a_run_says_where_its_model_is(folder):
    with pytest.raises(ValueError, match=f"is the folder of a run; its model is {re.escape(str(folder))}"):
        nanovlm.load(folder.parent)


def test_a_folder_has_one_writer(tmp_path):
    with (
        lock(tmp_path),
        pytest.raises(ValueError, match=f"another process is writing to {re.escape(str(tmp_path))}"),
        lock(tmp_path),
    ):
        pass
    with lock(tmp_path):
        pass


def test_tied_and_untied_heads_are_saved(tmp_path, processor):
    for tied in (True, False):
        config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=tied))
        save_model(tmp_path / "model", VLM(config), processor)
        assert ("decoder.lm_head.weight" in nanovlm.load(tmp_path / "model")[0].state_dict()) is not tied


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("nanovlm.files.fcntl.flock", refuse)
    with lock(tmp_path / "run"):
        pass
    assert capsys.readouterr().out.count("cannot be locked") == 1
