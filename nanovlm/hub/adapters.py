"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, written and read.

```
decoder.layers.0.self_attn.q_proj, lora_A       base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                   magnitude                                         ... .lora_magnitude_vector
decoder.layers.0.mlp.gate_proj, lora_A [E, ..]  ... .mlp.experts.{0, 1, ...}.gate_proj.lora_A.weight
projector.proj.weight, which learned beside     base_model.model.model.connector.modality_projection.proj.weight
```

Layers have the names of the hub layout that the base is exported to (families.py), and our own where it has none. The
names of experts are those of transformers before 5, which PEFT turns into the stacked ones of today as it reads them.
Which layers have adapters is read from the names of the tensors, not from target_modules.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor, cat, nn

from nanovlm.config import AdapterConfig, VLMConfig, from_dict
from nanovlm.errors import UserError
from nanovlm.files import new_folder, read_json
from nanovlm.hub.download import SHORT_NAMES, find
from nanovlm.hub.families import HEAD, check_projector, check_vision, find_family, find_names
from nanovlm.hub.weights import destinations, tensor_names, unknown_tensors
from nanovlm.model.adapted import STACKS
from nanovlm.model.adapters import DEFAULT, activate, adapt, adapter_tensors, is_adapter, learns
from nanovlm.model.build import meta_model
from nanovlm.model.moe import MoE
from nanovlm.model.quantized import QuantizedLinear
from nanovlm.model.vlm import VLM
from nanovlm.sharded import places
from nanovlm.tensor_files import copy_tensors, open_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FIELDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
Names = dict[str, str | tuple[str, ...]]
# Of a base that has no hub layout.
OWN: Names = {f"{part}.": f"{part}." for part in ("vision", "projector", "fusion", "decoder", "score")}
EMBEDDING = "decoder.embed_tokens.weight"
# PEFT's names of first weights that leave the base as it is, by ours.
INITS = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
KEEP_BASE = (None, False, "eva", *INITS.values())
# Fields of adapter_config.json that are read, and those that say nothing about what the adapter computes. Any other
# must be empty.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_core", "modules_to_save"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
)


def save_adapter(folder: Path, model: VLM, name: str = DEFAULT, tensors: dict[str, Tensor] | None = None):
    """Write an adapter of a model, and what its `train` names, which learned beside it, as PEFT's modules_to_save.

    `tensors`, if given, replace the model's own.
    """
    tensors = model.state_dict() if tensors is None else tensors
    config, table, mine = model.adapters.configs[name], find_table(model), adapter_tensors(model, name, tensors)
    # Of layers with names of experts PEFT 0.21.2 takes all for experts, and would leave adapters of dense ones out.
    has_dense = 0 < len(model.config.decoder.mixtures) < model.config.decoder.num_hidden_layers
    if has_dense and any(".mlp." in key for key in mine):
        table = OWN
    own = destinations(mine, table)
    adapted = {their_name(theirs).rpartition(".lora_")[0] for theirs in own}
    files = {their_name(theirs): parts for theirs, parts in own.items()}
    beside = destinations({key: tensors[key] for key in learned_beside(model, config)}, table)
    is_tied = model.config.decoder.tie_word_embeddings and EMBEDDING in learned_beside(model, config)
    if is_tied and table is not OWN:
        beside[HEAD] = [tensors[EMBEDDING].clone()]  # safetensors writes no tensor twice
    files |= {PREFIX + theirs: parts for theirs, parts in beside.items()}
    # PEFT adds rows of gate and up to one matrix of rank 2 r, which has another square root.
    uses_rslora = config.use_rslora and not has_stacks(model, name)
    alpha = config.alpha if uses_rslora else config.scale * config.rank
    data = {
        "peft_type": "LORA",
        "task_type": find_task(model.config),
        **name_base(model.adapters.base),
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "use_rslora": uses_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "init_lora_weights": INITS[config.init],
        "target_modules": name_targets({path.removeprefix(PREFIX) for path in adapted}, name_layers(model, table)),
        "modules_to_save": sorted({theirs.rpartition(".")[0] for theirs in beside}) or None,
        "ensure_weight_tying": is_tied,
        "inference_mode": True,
    }
    with new_folder(folder.resolve()) as temporary:
        (temporary / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        whole = {key: parts[0] if len(parts) == 1 else cat(parts) for key, parts in files.items()}
        save_file({key: x.contiguous() for key, x in whole.items()}, temporary / WEIGHTS, {"format": "pt"})


class StoredAdapter(NamedTuple):
    """An adapter on disk, read but for its tensors."""

    config: AdapterConfig
    # The model that it was made for, as its file says; may be empty.
    base: str
    # Our names of the tensors that it has in place of the base's.
    beside: list[str]
    # (places, name = DEFAULT) copies its tensors into those of a model that has an adapter of this name. Raises
    # UserError that names tensors that are missing, unknown or of another shape, before anything is copied.
    fill: Callable[..., None]


def open_adapter(name: str | Path, model: VLM) -> StoredAdapter:
    """Read all of an adapter but its tensors, for a model, which may be on the meta device.

    `name` is a folder or a repository of the hub. Raises UserError that names what is missing or not supported.
    """
    folder = find_adapter(name)
    file, data = folder / WEIGHTS, read_json(folder / CONFIG)
    check_settings(data, folder / CONFIG)
    names = tensor_names(file)
    ours = tuple(PREFIX + part for part in OWN if part != "score.")  # as which a reward model has it in transformers
    table = OWN if any(key.startswith(ours) for key in names) else find_table(model)
    theirs_to_ours = name_layers(model, table)
    layers = {key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in names if ".lora_" in key}
    if unknown := sorted(layers - theirs_to_ours.keys()):
        raise UserError(f"{file} has an adapter of {unknown[0]}, which is no linear layer of the model")
    if not layers:
        raise UserError(f"{file} has no tensors of an adapter")
    chosen = {theirs_to_ours[path] for path in layers}
    usual = {path for path in theirs_to_ours.values() if re.search(AdapterConfig.target, path)}
    tensors = {key: x for key, x in model.state_dict().items() if not is_adapter(key)}
    ours = {PREFIX + theirs: key for key, x in tensors.items() for theirs in destinations({key: x}, table)}
    head = PREFIX + HEAD if model.config.decoder.tie_word_embeddings else ""
    beside = sorted({ours[key] for key in names if key in ours})
    if head:
        check_tied(file, [key for key in names if ours.get(key) == EMBEDDING], head, data)
    fields = {
        "rank": data.get("r"),
        "alpha": data.get("lora_alpha"),
        "dropout": data.get("lora_dropout", 0.0),
        "use_rslora": data.get("use_rslora", False),
        "use_dora": data.get("use_dora", False),
        "target": AdapterConfig.target if chosen == usual else find_pattern(chosen, theirs_to_ours.values()),
        "train": [f"^{re.escape(key)}$" for key in beside],
    }
    try:
        config = from_dict(AdapterConfig, fields).validate()
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error

    def fill(places: dict, name: str = DEFAULT):
        if left := [key for key in beside if key not in places]:
            raise UserError(f"{file} has a {left[0]} of its own, and the model's is quantised")
        own = destinations(adapter_tensors(model, name, places), table)
        wanted: dict[str, list] = {their_name(theirs): parts for theirs, parts in own.items()}
        for key, parts in destinations({key: places[key] for key in beside}, table).items():
            wanted[PREFIX + key] = parts
        wanted.pop(head, None)
        copy_tensors(wanted, [file], head.__eq__, f"the model with r = {config.rank}")

    return StoredAdapter(config, data.get("base_model_name_or_path") or "", beside, fill)


def attach(model: VLM, folder: str | Path, name: str = DEFAULT, base: str = "") -> VLM:
    """Read an adapter from a folder or the hub into a model, in place, active from now on.

    If the adapter says that it was made for another model than `base`, the name of this one, that is printed. Raises
    UserError for what does not fit the model, which then is as it was.
    """
    stored = open_adapter(folder, model)
    if base and stored.base and stored.base not in (base, name_base(base)["base_model_name_or_path"]):
        print(f"note: {folder} was made for {stored.base}, and is used with {base}", file=sys.stderr)
    stored.fill(
        adapt(meta_model(model.config), stored.config).state_dict()
    )  # before memory is taken for what it claims
    adapt(model, stored.config, name)
    stored.fill(places(model), name)
    return model


def attach_all(model: VLM, named: Sequence[str], base: str = ""):
    """Read adapters, each as name=FOLDER, for requests to choose from; what is active stays so.

    Raises UserError for one that brings weights of the model's own, as there is one of these for all.
    """
    active = model.adapters.active if model.adapters else ()
    for one in named:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise UserError(f"an adapter is given as name=FOLDER, not {one!r}")
        if beside := open_adapter(folder, model).beside:
            raise UserError(f"{folder} brings a {beside[0]} of its own, so no request can choose it: merge it")
        attach(model, folder, name, base)
        activate(model, *active)


def find_adapter(name: str | Path) -> Path:
    """Return the folder with an adapter, downloaded if need be. Raises UserError that says what is there instead."""
    folder = find(name, (CONFIG, WEIGHTS))
    if (folder / "adapter" / CONFIG).is_file():
        raise UserError(f"{folder} is the folder of a run; its adapter is {folder / 'adapter'}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no adapter: it has no {CONFIG}")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} has an adapter_model.bin, which could run any code when read: have PEFT save {WEIGHTS}"
        )
    return folder


def check_tied(file: Path, embedding: list[str], head: str, data: dict):
    """Raise UserError if a file has only one of embeddings and head, or two that differ, for a model that ties them."""
    with open_tensors(file) as opened:
        found = [opened.get_tensor(key) for key in (*embedding, head) if key in opened.keys()]
    is_one = len(found) == 2 and found[0].equal(found[1])
    if found and not is_one and not (len(found) == 1 and embedding and data.get("ensure_weight_tying")):
        raise UserError(f"{file} has embeddings or a head without the other, and the model has one tensor for both")


def check_settings(data: dict, path: Path):
    """Raise UserError for a setting that changes what an adapter computes and that ours do not have."""
    if data.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type = {data.get('peft_type')!r} is not supported; it must be 'LORA'")
    if (init := data.get("init_lora_weights")) not in KEEP_BASE:
        raise UserError(
            f"{path}: init_lora_weights = {init!r} changed the base too: have PEFT save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it fit the base as it was"
        )
    for field, value in data.items():
        if field not in (*READ, *IGNORED) and value not in (None, False, {}, [], "", "none"):
            raise UserError(f"{path}: {field} = {value!r} is not supported; it must be empty")


def find_task(config: VLMConfig) -> str | None:
    """Return PEFT's name of what a model does; it has none for one that sees."""
    if config.vision is not None:
        return None
    return "SEQ_CLS" if config.has_score_head else "CAUSAL_LM"


def name_base(name: str) -> dict:
    """Return what adapter_config.json says about the base, which PEFT looks for without our short names."""
    if name and Path(name).is_dir():
        return {"base_model_name_or_path": name, "revision": None}
    repository, _, revision = name.partition("@")
    return {"base_model_name_or_path": SHORT_NAMES.get(repository, repository) or None, "revision": revision or None}


# --- names ----------------------------------------------------------------------------------------------------


def find_table(model: VLM) -> Names:
    """Return the name table of the hub layout that a model is exported to, or OWN where none has all that it has."""
    try:
        check_vision(model.config.vision)
        check_projector(model.config)
        table = find_names(find_family(model.config.decoder), model.config.vision is not None) | {"score.": "score."}
    except UserError:
        return OWN
    return OWN if unknown_tensors(model, table) else table


def name_layers(model: VLM, table: Names) -> dict[str, str]:
    """Map their names of linear layers to ours; those of a mixture's experts to the stack that they are in."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            layers[path] = module.bias if isinstance(module, QuantizedLinear) else module.weight
        elif isinstance(module, MoE):
            layers |= {f"{path}.{stack}": getattr(module, stack) for stack in STACKS}
    return {
        theirs.removesuffix(".").removesuffix(".weight"): path
        for path, place in layers.items()
        for theirs in destinations({f"{path}.": place}, table)
    }


def their_name(theirs: str) -> str:
    """model.layers.0.mlp.experts.0.gate_proj.weight.lora_A -> PEFT's name of the tensor."""
    layer, _, field = theirs.rpartition(".")
    return f"{PREFIX}{layer.removesuffix('.weight')}.{FIELDS[field]}"


def name_targets(adapted: set[str], layers: dict[str, str]) -> list[str] | str:
    """Return target_modules: the ends of the names where no other layer has them, else a regular expression."""
    ends = {path.rpartition(".")[2] for path in adapted}
    if {path for path in layers if path.rpartition(".")[2] in ends} == adapted:
        return sorted(ends)
    return find_pattern(adapted, layers)


def find_pattern(chosen: set[str], names: Iterable[str]) -> str:
    """Return a regular expression for these of the names and no others, with any number for each where that fits."""
    short = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in chosen})
    pattern = f"^({'|'.join(short)})$"
    if {name for name in names if re.search(pattern, name)} == chosen:
        return pattern
    return f"^({'|'.join(map(re.escape, sorted(chosen)))})$"


def learned_beside(model: VLM, config: AdapterConfig) -> list[str]:
    """Return the tensors of the modules of which a parameter learned beside the adapters."""
    owners = {
        key.rpartition(".")[0] for key, _ in model.named_parameters() if not is_adapter(key) and learns(key, config)
    }
    return [key for key in model.state_dict() if key.rpartition(".")[0] in owners]


def has_stacks(model: VLM, name: str) -> bool:
    return any(x.ndim == 3 for x in adapter_tensors(model, name).values())
