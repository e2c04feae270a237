"""A name -> model and processor, from any supported layout, by one function, `load`.

```
owner/name --download--> folder --config.json--> VLMConfig --> model without weights
                           |--*.safetensors, by the name table ------> its weights, tensor by tensor into place
                           |--tokenizer, template, image settings ---> Processor
```

An adapter in PEFT's layout (adapters.py) is loaded with the model that it says it is for.

`find_model` reads all but the weights, which can then be copied into a model that is sharded over ranks.
"""

import sys
from pathlib import Path

import torch

from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub import gguf
from nanovlm.hub.adapters import attach
from nanovlm.hub.configs import check_kind, read_config, read_template
from nanovlm.hub.download import find, holds_adapter, refuse_adapter
from nanovlm.hub.gemma3 import open_gemma3
from nanovlm.hub.llava import open_llava
from nanovlm.hub.model_folder import open_folder
from nanovlm.hub.nanovlm_layout import open_nanovlm
from nanovlm.hub.paligemma import open_paligemma
from nanovlm.hub.qwen_vl import open_qwen
from nanovlm.hub.stored import Stored, read_model
from nanovlm.hub.weights import open_weights
from nanovlm.model.vlm import VLM


def load(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a model and its processor; the model is in evaluation mode.

    `name` is one of our model folders, a folder in a hub layout, a repository on the hub (`owner/name` or
    `owner/name@revision`) or a short name of one (SHORT_NAMES of download.py), a .gguf file, or `smollm2` (see
    gguf.py). The weights have the dtype of their file unless another is given. An adapter is active in the model that
    its adapter_config.json names. Raises UserError that names the file, field or tensor that is missing, unknown or
    not supported.
    """
    if is_gguf(name) or not holds_adapter(folder := find(name)):
        return read_model(find_model(name), device, dtype)
    model, processor = read_model(find_base(folder), device, dtype)
    return attach(model, folder), processor


def find_base(folder: Path) -> Stored:
    """Find the model that an adapter was made for."""
    data = read_json(folder / "adapter_config.json")
    base, revision = data.get("base_model_name_or_path"), data.get("revision")
    otherwise = f"name its model and beside it the adapter, or merge it: python -m nanovlm.hub.merge MODEL {folder} OUT"
    if not base or not isinstance(base, str):
        raise UserError(f"{folder} is an adapter that does not say which model it is for: {otherwise}")
    name = f"{base}@{revision}" if revision and not Path(base).is_dir() else base
    print(f"{folder} is an adapter for {name}, which is read too", file=sys.stderr)
    try:
        return find_model(name)
    except UserError as error:
        raise UserError(f"{folder} is an adapter for {name}, which cannot be read ({error}): {otherwise}") from error


def is_gguf(name: str | Path) -> bool:
    return str(name) == "smollm2" or str(name).endswith(".gguf")


def find_model(name: str | Path) -> Stored:
    """Read a model except its weights; takes the same names and raises the same errors as `load`."""
    if is_gguf(name):
        return gguf.open_model(name)
    folder = find(name)
    refuse_adapter(folder)
    data = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "vit_hidden_dim" in data:
        return open_nanovlm(folder)
    if "model_type" not in data:
        return open_folder(folder)
    if (kind := str(data["model_type"])) in OTHERS:
        if data.get("quantization_config") is not None:
            raise UserError(
                f"{folder / 'config.json'}: quantization_config is not read of model_type = {kind!r}, only of language "
                "models and Idefics3: take the model that it was made of, and --quantize"
            )
        return OTHERS[kind](folder)
    check_kind(data, folder / "config.json")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_config(folder, tokenizer)
    processor = Processor(tokenizer, read_template(folder, tokenizer), config)
    return Stored(config, processor, *open_weights(folder, config))


# Vision-language models with layouts of their own: model_type -> function that reads all but the weights.
OTHERS = {
    "llava": open_llava,
    "gemma3": open_gemma3,
    "paligemma": open_paligemma,
    "llava_onevision": open_llava,
    "internvl": open_llava,
    "qwen2_5_vl": open_qwen,
    "qwen3_vl": open_qwen,
    "qwen3_vl_moe": open_qwen,
}
