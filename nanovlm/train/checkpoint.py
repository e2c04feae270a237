"""Run state on disk: what a run needs to resume. Every rank writes its own shard while training goes on.

```
run_dir/checkpoints/step_00000200/   state.json  rng.safetensors  tensors/shard-00001-...safetensors, one of each rank
                                     checksums.json
```

These are torch's distributed checkpoints (DCP) as safetensors; any number of ranks can read them. A folder gets its
final name once all of it is on disk.
"""

import contextlib
import hashlib
import json
import operator
import re
import shutil
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from nanovlm import distributed
from nanovlm.errors import UserError, printable
from nanovlm.files import flush, read_json
from nanovlm.model.vlm import VLM
from nanovlm.tensor_files import read_tensors

# Silences DCP's warning about a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Saving:
    """A checkpoint of which every rank writes its own shard while training goes on.

    `state` (plain numbers, lists and strings) and `rng` are those of all ranks. The constructor copies the tensors
    before it returns. Raises OSError that names what cannot be written.
    """

    def __init__(
        self, run_dir: Path, model: VLM, optimizers: dict, state: dict, rng: dict[str, torch.Tensor], keep: int
    ):
        self.run_dir, self.keep, self.is_finished = run_dir, keep, False
        self.folder = run_dir / "checkpoints" / f"step_{state['step']:08d}"
        self.temporary = self.folder.with_name(f".{self.folder.name}.tmp")
        with writing(self.folder):
            if distributed.rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir(parents=True)
                (self.temporary / "state.json").write_text(json.dumps(state))
                save_file(rng, self.temporary / "rng.safetensors")
            distributed.wait()
            writer = HuggingFaceStorageWriter(str(self.temporary / "tensors"), save_distributed=True)
            group = distributed.checkpoint_group()
            saving = dcp.async_save(  # pyright: ignore[reportPrivateImportUsage]
                name_tensors(model, optimizers), storage_writer=writer, process_group=group
            )
        executor = ThreadPoolExecutor(1)
        self.written: Future = executor.submit(self._finish_files, saving)
        executor.shutdown(wait=False)

    def _finish_files(self, saving):
        """Wait until all ranks have written, then hash and flush the files, each rank its own; beside the training."""
        saving.result()
        try:
            sums = self._finish_own(f"shard-{distributed.rank() + 1:05d}-")  # as DCP names a rank's files
        except Exception as error:
            sums = error  # for all ranks to raise, which would wait for this one
        found = {}
        for of_rank in distributed.gather(sums, distributed.checkpoint_group()):
            if isinstance(of_rank, Exception):
                raise of_rank
            found |= of_rank
        if distributed.rank() == 0:
            found |= self._finish_own("", found)
            (self.temporary / "checksums.json").write_text(json.dumps(found))
            for file in (self.temporary / "checksums.json", self.temporary / "tensors", self.temporary):
                flush(file)

    def _finish_own(self, prefix: str, done: Collection[str] = ()) -> dict[str, str]:
        """Flush the files whose names begin with `prefix`, but those that are done; return their checksums."""
        files = {str(file.relative_to(self.temporary)): file for file in sorted(self.temporary.rglob(f"{prefix}*"))}
        own = {name: file for name, file in files.items() if file.is_file() and name not in done}
        for file in own.values():
            flush(file)
        return {name: checksum(file) for name, file in own.items()}

    def finish(self, wait: bool = True):
        """Once all is written, for which `wait` waits, rename the folder and remove all but the newest `keep`."""
        if self.is_finished or not (wait or self.written.done()):
            return
        with writing(self.folder):
            self.written.result()
            if distributed.rank() == 0:
                self.temporary.rename(self.folder)
                flush(self.folder.parent)
                for old in list_checkpoints(self.run_dir)[: -self.keep]:
                    old.rename(old.with_name(f".{old.name}.gone"))
                for gone in self.folder.parent.glob(".step_*"):
                    shutil.rmtree(gone, ignore_errors=True)
        self.is_finished = True


def name_tensors(model: VLM, optimizers: dict) -> dict[str, torch.Tensor]:
    """Return every tensor of a run by name: model.NAME, and KIND.NAME.FIELD for optimizer state.

    A group of parameters that are none of the model's has their `names`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            names |= zip(group["params"], group.get("names", ()), strict=False)
        for parameter, fields in optimizer.state.items():
            tensors |= {f"{kind}.{names[parameter]}.{field}": tensor for field, tensor in fields.items()}
    return tensors


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d{8,}", folder.name) and folder.is_dir())


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints up to the newest one whose files are as they were written, oldest first.

    Newer ones, which are damaged, are named, and set aside if there is one to go on from. Raises OSError if one cannot
    be read for another reason.
    """
    whole, damaged = list_checkpoints(run_dir), []
    while whole and (damage := find_damage(whole[-1])):
        damaged.append(whole.pop())
        print(f"note: the checkpoint {damaged[-1]} is damaged: {printable(damage)}")
    for folder in damaged if whole else []:
        aside = folder.with_name(f".{folder.name}.damaged")
        print(f"note: {folder} is now {aside}, until the next one is saved")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return whole


def steps_saved(run_dir: Path) -> int:
    """Return the step of the newest checkpoint that a run ever had here, whole or not; 0 without any."""
    names = [folder.name for folder in (run_dir / "checkpoints").glob("*step_*")]
    return max(
        (int(found[1]) for name in names if (found := re.fullmatch(r"\.?step_(\d{8,})(\.damaged)?", name))), default=0
    )


def find_damage(folder: Path) -> str:
    """Compare the files of a checkpoint with its checksums; return what is wrong, or nothing."""
    if not (folder / "checksums.json").exists():
        return "it has no checksums.json"
    try:
        sums = read_json(folder / "checksums.json")
        for name in sums:
            if not (folder / name).is_file():
                return f"it has no {name}"
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(checksum, (folder / name for name in sums)))
        for name, is_same in zip(sums, map(operator.eq, found, sums.values()), strict=True):
            if not is_same:
                return f"{name} is not as it was written"
        tensors = {f"tensors/{path.name}" for path in (folder / "tensors").glob("*.safetensors")}
        if missing := ({"state.json", "rng.safetensors"} | tensors) - sums.keys():
            return f"checksums.json has no {' and no '.join(sorted(missing))}"
    except (UserError, IsADirectoryError) as error:
        return str(error)
    return ""


def checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_checkpoint(folder: Path, model: VLM, optimizers: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Restore model and optimizers, whatever number of ranks wrote them; return the saved `state` and `rng`.

    Raises UserError that names what is damaged, missing or of another shape.
    """
    reader = HuggingFaceStorageReader(str(folder / "tensors"))
    try:
        dcp.load(name_tensors(model, optimizers), storage_reader=reader)  # pyright: ignore[reportPrivateImportUsage]
    except (OSError, KeyError, ValueError, SafetensorError, CheckpointException) as error:
        raise UserError(f"{folder} is damaged or does not fit the config: {first_line(error)}") from error
    return read_json(folder / "state.json"), read_tensors(folder / "rng.safetensors")


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of torch's random generators in this process, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]):
    """Go on from what `rng_state` returned."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def writing(path: Path):
    """Turn a failed write into an OSError that names the path; what was written of it is removed."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(path.with_name(f".{path.name}.tmp"), ignore_errors=True)  # a full disk would stay full
        raise OSError(f"could not write {path}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; of a CheckpointException, that of the first failed rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).split("\n")[0]
