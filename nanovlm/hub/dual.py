"""A name -> a dual model and its processor, and back: our own layout, and those of the hub (dual_layouts.py).

```
run_dir/model/    config.json  model.safetensors  tokenizer.json     our own; this config.json has no model_type
hub layout        the same three, preprocessor_config.json and tokenizer_config.json
```

    python -m nanovlm.hub.dual RUN_DIR/model OUT_DIR        write a model of ours in a hub layout
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanovlm import cli
from nanovlm.config import DualConfig, from_dict
from nanovlm.data.dual import DualProcessor
from nanovlm.errors import UserError
from nanovlm.files import find_folder, new_folder, read_json, refuse_run
from nanovlm.hub.download import find
from nanovlm.hub.dual_layouts import LAYOUTS, StoredDual, export_dual, find_layout, open_hub
from nanovlm.model.build import meta_dual
from nanovlm.model.dual import Dual
from nanovlm.sharded import Places
from nanovlm.tensor_files import copy_tensors, file_dtype


def load_dual(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Dual, DualProcessor]:
    """Read a dual model and its processor; the model is in evaluation mode, in the dtype of its file by default.

    `name` is one of our model folders, a folder in a hub layout, or a repository on the hub (`owner/name[@revision]`).
    Raises UserError that names the file, field or tensor that is missing, unknown or not supported.
    """
    stored = find_dual(name)
    model = meta_dual(stored.config).to(dtype or stored.dtype)
    stored.fill(model.state_dict())  # before memory is taken for whatever a config claims
    model.to_empty(device=device)
    stored.fill(model.state_dict())
    return model.eval(), stored.processor


def find_dual(name: str | Path) -> StoredDual:
    """Read all of a dual model but its weights; takes the same names and raises the same errors as `load_dual`."""
    folder = find_folder(Path(name)) if Path(name).parent.exists() else Path(name)
    folder = folder if folder.is_dir() else find(name)
    refuse_run(folder)
    path = folder / "config.json"
    data = read_json(path)
    if "model_type" in data:
        return open_hub(folder, data)
    if "decoder" in data:
        raise UserError(f"{folder} is a vision-language model: a dual encoder, of a contrastive run, is needed here")
    try:
        config = from_dict(DualConfig, data).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    file = folder / "model.safetensors"

    def fill(places: Places):
        copy_tensors({name: [place] for name, place in places.items()}, [file])

    return StoredDual(config, DualProcessor.load(folder, config), file_dtype([file]), fill)


def fill_image_tower(places: Places, stored: StoredDual):
    """Copy the image tower of a stored dual model into another model; the rest is checked and not read."""
    theirs = meta_dual(stored.config).state_dict()
    stored.fill(theirs | {name: places[name] for name in theirs if name.startswith("vision.") and name in places})


def save_dual(folder: Path, model: Dual, processor: DualProcessor, tensors: dict[str, torch.Tensor] | None = None):
    """Write a dual model in our own layout; `tensors`, if given, replace the model's own."""
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))
        tensors = model.state_dict() if tensors is None else tensors
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary / "model.safetensors")
        processor.save(temporary)


def main(args: list[str] | None = None):
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    def run(source: str, out: Path):
        """Write a dual model in the hub layout that has its features, SigLIP's or CLIP's.

        Args:
            source: Model folder, such as the model/ of a run.
            out: Folder to write; new or empty.
        """
        model, processor = load_dual(source)
        export_dual(model, processor, out)
        print(f"wrote {out}: a {LAYOUTS[find_layout(model.config)].architecture}")

    tyro.cli(run, args=args, prog="python -m nanovlm.hub.dual", config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    cli.run(main)
