"""Run state on disk: what a run needs to resume. Every rank writes its own shard while training goes on.

```
run_dir/checkpoints/step_00000200/   state.json  rng.safetensors  tensors/shard-00001-...safetensors, one of each rank
```

These are torch's distributed checkpoints (DCP) as safetensors; any number of ranks can read them. A folder gets its
final name once all of it is on disk.
"""

import contextlib
import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from nanovlm import distributed
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
            written = dcp.async_save(  # pyright: ignore[reportPrivateImportUsage]
                name_tensors(model, optimizers), storage_writer=writer, process_group=group
            )
            assert isinstance(written, Future)  # an AsyncSaveResponse comes only from an asynchronous stager
            self.written = written

    def finish(self, wait: bool = True):
        """Once all is written, for which `wait` waits, rename the folder and remove all but the newest `keep`."""
        if self.is_finished or not (wait or self.written.done()):
            return
        with writing(self.folder):
            self.written.result()
            if distributed.rank() == 0:
                for file in (*self.temporary.rglob("*"), self.temporary):
                    flush(file)
                self.temporary.rename(self.folder)
                flush(self.folder.parent)
                for old in list_checkpoints(self.run_dir)[: -self.keep]:
                    old.rename(old.with_name(f".{old.name}.gone"))
                for gone in self.folder.parent.glob(".step_*"):
                    shutil.rmtree(gone, ignore_errors=True)
        self.is_finished = True


def name_tensors(model: VLM, optimizers: dict) -> dict[str, torch.Tensor]:
    """Return every tensor of a run by name: model.NAME, and KIND.NAME.FIELD for optimizer state."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for parameter, fields in optimizer.state.items():
            tensors |= {f"{kind}.{names[parameter]}.{field}": tensor for field, tensor in fields.items()}
    return tensors


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def load_checkpoint(folder: Path, model: VLM, optimizers: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Restore model and optimizers, whatever number of ranks wrote them; return the saved `state` and `rng`.

    Raises ValueError that names what is damaged, missing or of another shape.
    """
    reader = HuggingFaceStorageReader(str(folder / "tensors"))
    parameters = dict(model.named_parameters())
    try:
        for key in reader.read_metadata().state_dict_metadata:
            kind, rest = key.split(".", 1)
            if kind != "model":  # AdamW's step count is a scalar; other fields have their parameter's shape
                name, field = rest.rsplit(".", 1)
                parameter = parameters[name]
                like = torch.zeros((), device=parameter.device) if field == "step" else torch.zeros_like(parameter)
                optimizers[kind].state[parameter][field] = like.detach()
        dcp.load(name_tensors(model, optimizers), storage_reader=reader)  # pyright: ignore[reportPrivateImportUsage]
    except (OSError, KeyError, ValueError, SafetensorError, CheckpointException) as error:
        raise ValueError(f"{folder} is damaged or does not fit the config: {first_line(error)}") from error
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
    """Turn a failed write into an OSError that names the path."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        raise OSError(f"could not write {path}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; of a CheckpointException, that of the first failed rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).split("\n")[0]
