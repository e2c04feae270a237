"""Our own layout of a model on disk.

```
run_dir/model/            config.json  model.safetensors  tokenizer.json  chat_template.jinja
```
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanovlm.config import VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.files import find_folder, new_folder, read_json, refuse_run
from nanovlm.hub.stored import Stored, read_model
from nanovlm.model.quantized import is_quantized
from nanovlm.model.vlm import VLM
from nanovlm.tensor_files import copy_tensors, file_dtype


def save_model(folder: Path, model: VLM, processor: Processor, tensors: dict[str, torch.Tensor] | None = None):
    """Write a model folder with all that `load` and generate.py need; `tensors`, if given, replace the model's own."""
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))
        tensors = model.state_dict() if tensors is None else tensors
        # Prepared for inference, matrices may be stored transposed.
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary / "model.safetensors")
        processor.save(temporary)


def load_folder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a model folder; the model is in evaluation mode, in the dtype of its file unless another is given.

    Raises UserError that names what is missing, unknown, truncated or of the wrong shape.
    """
    return read_model(open_folder(folder), device, dtype)


def open_folder(folder: str | Path) -> Stored:
    """Read all of a model folder but the weights. Raises UserError that names what is missing or damaged."""
    folder = find_folder(Path(folder))
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    refuse_run(folder)
    data = read_json(folder / "config.json")
    if "text" in data and "decoder" not in data:
        raise UserError(f"{folder} is a dual encoder: a vision-language model, which answers, is needed here")
    try:
        config = from_dict(VLMConfig, data).validate()
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    processor = Processor.load(folder, config)
    file = folder / "model.safetensors"

    def fill(places):
        copy_tensors({name: [place] for name, place in places.items()}, [file])

    return Stored(config, processor, file_dtype([file], is_quantized), fill)
