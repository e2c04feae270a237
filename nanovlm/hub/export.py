"""Model -> folder in a hub layout, GGUF files or ONNX graphs, for transformers, llama.cpp and browsers (docs/hub.md).

```
run or model folder --load--> model, processor --check_exportable--> files under a temporary name --> OUT_DIR
```

A vision-language model becomes an Idefics3, a language model one of the family that has its features. Fields that
older and newer readers name differently are written under both names. `transformers` is not needed; only `check` uses
it, if it is installed.

    python -m nanovlm.hub.export runs/demo OUT_DIR --check
    python -m nanovlm.hub.export runs/mine OUT_DIR --format gguf --dtype q8_0
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovlm import cli
from nanovlm.config import RopeScalingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CONTINUATION_TEMPLATE
from nanovlm.errors import UserError
from nanovlm.files import new_folder
from nanovlm.hub import families, weights
from nanovlm.hub.card import describe, model_card
from nanovlm.hub.check import check, find_llama_cpp_traps
from nanovlm.hub.families import IDEFICS3_TOKENS, IMAGE, find_family
from nanovlm.hub.gguf_export import check_gguf, write_gguf
from nanovlm.hub.onnx import LARGEST_FILE, check_onnx, graph_card, make_onnx_config, write_graphs
from nanovlm.hub.push import check_name, push
from nanovlm.hub.read import load
from nanovlm.hub.vllm_export import MODEL_TYPE, check_vllm, make_vllm_config
from nanovlm.infer.sampling import find_stops
from nanovlm.model.adapters import merge
from nanovlm.model.vlm import VLM
from nanovlm.tensor_files import merge_numbers

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
GRAPHS = ("fp32", "q8", "q4")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in a hub layout: Idefics3, or for a language model that of its family; or as GGUF files."""

    # Run directory, model folder, or repository on the hub.
    source: str
    # Folder to write; new or empty.
    out: Path
    # hub: for transformers and what reads its files; gguf: for llama.cpp; onnx: for onnxruntime and transformers.js, in
    # browsers too; vllm: for vLLM with our plug-in, of models that no published layout has.
    format: Literal["hub", "gguf", "onnx", "vllm"] = "hub"
    # Read the result again: compare all tensors, and with transformers if installed; list traps of other programs.
    check: bool = False
    # Precision of the weights: float32, bfloat16, float16, or auto, which keeps that of the source; of GGUF files also
    # q8_0, q5_1, q5_0, q4_1 or q4_0.
    dtype: str = "auto"
    # Also send it to this repository on the hub, OWNER/NAME, with the token of hf auth login or HF_TOKEN.
    push: str | None = None
    # Largest size of a weight file, in GB; a larger model is split into several files.
    shard_size: float = 5.0
    # onnx: precisions that are written, each in files of its own; q8 and q4 are weights in 8 and 4 bits.
    graphs: tuple[Literal["fp32", "q8", "q4"], ...] = GRAPHS

    def validate(self) -> "ExportConfig":
        """Raise UserError for an option that the format does not have; return self."""
        if self.push is not None:
            check_name(self.push)
        if not 0 < self.shard_size < math.inf:
            raise UserError(f"shard_size = {self.shard_size:g} must be a number of GB above 0")
        if self.check and self.format != "hub":
            raise UserError(f"check = True compares what format = hub writes, not {self.format}")
        if self.format != "onnx" and self.graphs != GRAPHS:
            raise UserError(f"graphs = {self.graphs} are those of format = onnx, not of {self.format}")
        if not self.graphs:
            raise UserError(f"graphs = {self.graphs} must be one or more of {', '.join(GRAPHS)}")
        if self.format == "onnx" and self.dtype != "auto":
            raise UserError(f"dtype = {self.dtype!r} is not for format = onnx, which has its precisions in graphs")
        if self.format in ("gguf", "onnx") and self.shard_size != ExportConfig.shard_size:
            raise UserError(f"shard_size = {self.shard_size:g} is not for format = {self.format}, which has no shards")
        return self


def main(args: list[str] | None = None):
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    options = (tyro.conf.PositionalRequiredArgs,)
    config = tyro.cli(ExportConfig, args=args, prog="python -m nanovlm.hub.export", config=options)
    config.validate()
    if config.format == "onnx":
        model, processor = export_onnx(config.source, config.out, config.graphs, name=config.push)
    else:
        model, processor = write(
            config.source, config.out, config.dtype, int(config.shard_size * 1e9), config.format, config.push
        )
    print(f"wrote {config.out}: {describe(model)}")
    if config.format == "gguf":
        for note in find_llama_cpp_traps(processor):
            print(f"note: {note}")
    if config.check:
        check(config.out, model)
    if config.push is not None:
        try:
            print(f"sent to {push(config.out, config.push)}")
        except UserError as error:
            again = f"python -m nanovlm.hub.push {config.out} {config.push}"
            raise UserError(f"{error}; {config.out} is written: send it with {again}") from None


def export(
    source: str | Path,
    out: str | Path,
    dtype: str = "auto",
    shard_bytes: int = 5_000_000_000,
    format: str = "hub",
) -> VLM:
    """Write the model of a run directory, a model folder or a repository to the folder `out`, and return it."""
    return write(source, out, dtype, shard_bytes, format)[0]


def write(
    source: str | Path, out: str | Path, dtype: str, shard_bytes: int, format: str, name: str | None = None
) -> tuple[VLM, Processor]:
    """Write the model of a run directory, a model folder or a repository to the folder `out`; the card says `name`.

    Raises UserError, before anything is written, if `out` is not empty or the layout cannot represent the model.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_size = {shard_bytes / 1e9:g} must be above 0")
    if format != "gguf" and dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype = {dtype!r} is not one of auto, {', '.join(DTYPES)}; others need format = gguf")
    out = Path(out).resolve()
    model, processor, folder = read_source(Path(source), out, None if format == "gguf" else DTYPES.get(dtype))
    if format == "vllm":
        check_vllm(processor.config)
    else:
        check_exportable(processor)
    if format == "gguf":
        check_gguf(processor, dtype)
    if format != "vllm" and (unknown := weights.unknown_tensors(model, find_layout(model))):
        raise UserError(f"the layout has no name for {', '.join(merge_numbers(unknown))}, which would be lost")
    run = folder.resolve().parent if (folder.resolve().parent / "metrics.jsonl").is_file() else None
    with new_folder(out) as temporary:
        if format == "gguf":
            write_gguf(temporary, out.name, model, processor, dtype)
        elif format == "vllm":
            files = make_files(model, processor, make_vllm_config(model.config, name_dtype(model)))
            write_files(temporary, files, processor)
            write_tensors(temporary, {name: (tensor,) for name, tensor in model.state_dict().items()}, shard_bytes)
        else:
            write_files(temporary, make_files(model, processor, make_config(model)), processor)
            write_weights(temporary, model, shard_bytes)
        files = [path.name for path in temporary.glob("*.gguf")]
        card = model_card(name or out.name, model, run, format, files)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return model, processor


def export_onnx(
    source: str | Path,
    out: str | Path,
    graphs: Sequence[str] = GRAPHS,
    largest_file: int = LARGEST_FILE,
    name: str | None = None,
) -> tuple[VLM, Processor]:
    """Write the model as ONNX graphs of these precisions to the folder `out`, in transformers.js' layout.

    Raises UserError, before anything is written, if `out` is not empty or the graphs cannot represent the model.
    """
    out = Path(out).resolve()
    model, processor, _folder = read_source(Path(source), out, torch.float32)
    check_onnx(processor.config)
    check_tiling(processor)
    with new_folder(out) as temporary:
        (temporary / "onnx").mkdir()
        beside = write_graphs(temporary / "onnx", model, graphs, largest_file)
        files = make_files(model, processor, make_onnx_config(processor.config, beside))
        write_files(temporary, files | {"README.md": graph_card(name or out.name, model, graphs)}, processor)
    return model, processor


def read_source(source: Path, out: Path, dtype: torch.dtype | None) -> tuple[VLM, Processor, Path]:
    """Return the model that is exported, its processor and its folder. Raises UserError if `out` is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    folder = source / "model" if (source / "model" / "config.json").is_file() else source
    model, processor = load(folder, dtype=dtype)
    if model.adapters is not None:
        merge(model)
    return model, processor, folder


def write_files(folder: Path, files: dict[str, dict | str], processor: Processor):
    """Write JSON objects and texts by file name, and tokenizer.json."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    processor.tokenizer.save(str(folder / "tokenizer.json"))


def check_exportable(processor: Processor):
    """Raise UserError that names a setting that no hub layout can represent."""
    config = processor.config
    if config.quantization is not None:
        raise UserError(
            f"quantization.format = {config.quantization.format!r} cannot be exported so: no other program reads it; "
            "export the model that it was made of, or int8 and int4 with format = onnx"
        )
    if config.decoder.prefix_attention != "causal":
        raise UserError(
            f"decoder.prefix_attention = {config.decoder.prefix_attention!r} cannot be exported: in the layouts "
            "that are written here every token sees those before it alone; use the model folder of the run as it is"
        )
    find_family(config.decoder)
    if config.vision is None:
        return
    families.check_vision(config.vision)
    families.check_projector(config)
    if config.fusion.type != "sequence":
        raise UserError(
            f"fusion.type = {config.fusion.type!r} cannot be exported: Idefics3, the layout of vision-language models, "
            "has image tokens in the sequence alone; use the model folder of the run as it is"
        )
    check_tiling(processor)
    if config.vision.grid_size in families.IDEFICS3_BAD_GRIDS:
        raise UserError(
            f"vision.image_size / vision.patch_size = {config.vision.grid_size} cannot be exported: Idefics3 gives "
            "some of so many patches a side one position"
        )


def check_tiling(processor: Processor):
    """Raise UserError unless pictures are shown to the model as Idefics3 shows them."""
    config, tokenizer = processor.config, processor.tokenizer
    if config.vision is None:
        return
    if config.tiling.policy != "idefics3":
        raise UserError(
            f"tiling.policy = {config.tiling.policy!r} cannot be exported: other programs cut images as Idefics3 does; "
            "train with tiling.policy = idefics3"
        )
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    missing = [token for token in IDEFICS3_TOKENS if token not in added]
    if missing or added[IMAGE] != config.image_token_id:
        raise UserError(
            f"the tokenizer cannot be exported: it needs the special tokens {', '.join(IDEFICS3_TOKENS)}, "
            + (f"but lacks {', '.join(missing)}" if missing else f"but image_token_id = {config.image_token_id}")
        )


def find_layout(model: VLM) -> dict[str, str | tuple[str, ...]]:
    """Return the name table of the layout in which the model is written."""
    return families.find_names(find_family(model.config.decoder), model.config.vision is not None)


def make_files(model: VLM, processor: Processor, config_json: dict) -> dict[str, dict | str]:
    """Return all files except weights, tokenizer and model card: JSON objects and texts by file name."""
    config, tokenizer = model.config, processor.tokenizer
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    never = sorted({config.pad_token_id, config.image_token_id} - {*find_stops(config), None})
    template = {} if processor.chat_template == CONTINUATION_TEMPLATE else {"chat_template": processor.chat_template}
    of_text = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokenizer.id_to_token(i) for name, i in tokens.items() if i is not None},
        "model_max_length": config.decoder.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        # Prompts of different lengths end at the same place, where all answers begin; and the default inputs include
        # token types, which transformers before 5 refuses to generate with.
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **template,
    }
    files: dict[str, dict | str] = {
        "config.json": config_json,
        "generation_config.json": {f"{name}_token_id": i for name, i in tokens.items()}
        | ({"eos_token_id": find_stops(config)} if config.stop_token_ids else {})
        # Padding and image tokens are never part of an answer, as in sampling.py.
        | ({"suppress_tokens": never} if never else {}),
        "tokenizer_config.json": of_text,
    }
    if template:
        files["chat_template.jinja"] = processor.chat_template
    if config.vision is None or config_json["model_type"] == MODEL_TYPE:  # whose pictures are cut by our own code
        return files
    of_text |= {"processor_class": "Idefics3Processor", "additional_special_tokens": list(IDEFICS3_TOKENS)}
    files["processor_config.json"] = {
        "processor_class": "Idefics3Processor",
        "image_seq_len": config.num_image_tokens,
    }
    files["preprocessor_config.json"] = {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_resize": True,
        "size": {"longest_edge": config.tiling.longest_edge},
        "max_image_size": {"longest_edge": config.vision.image_size},
        "resample": 1,  # Lanczos
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        # With [0, 1] pixels a black tile would be all zeros, which Idefics3 takes for padding and drops.
        "image_mean": list(config.vision.mean),
        "image_std": list(config.vision.std),
        "do_pad": True,
    }
    return files


def name_dtype(model: VLM) -> str:
    return str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")


def make_config(model: VLM) -> dict:
    """Return the config.json of a model."""
    dtype = name_dtype(model)
    return (make_text_config if model.config.vision is None else make_idefics3_config)(model.config, dtype)


def make_idefics3_config(config: VLMConfig, dtype: str) -> dict:
    """Return the config.json of a vision-language model."""
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "scale_factor": config.projector.scale_factor,
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "vision_config": {
            "model_type": "idefics3_vision",
            **{field: getattr(config.vision, field) for field in families.VISION_FIELDS},
            **families.FIXED_VISION,
            "dtype": dtype,
            "torch_dtype": dtype,
        },
        "text_config": make_text_config(config, dtype),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def make_text_config(config: VLMConfig, dtype: str) -> dict:
    """Return the config.json of a language model."""
    d = config.decoder
    family = find_family(d)
    fields = {field: getattr(d, field) for field in families.DECODER_FIELDS}
    if family not in ("llama", "qwen3") and d.head_dim * d.num_attention_heads == d.hidden_size:
        del fields["head_dim"]  # these families leave it out
    if family not in ("qwen2", "mixtral"):
        fields["attention_bias"] = d.qkv_bias
    if moe := families.DECODERS[family].moe:
        fields |= {theirs: getattr(d.moe, ours) for theirs, ours in moe.items()}
        if dense := [i for i in range(d.num_hidden_layers) if i not in d.mixtures]:
            fields["mlp_only_layers"] = dense
    if family == "smollm3":
        fields["no_rope_layers"] = [int(i not in d.layers_without_rope) for i in range(d.num_hidden_layers)]
    default = RopeScalingConfig()
    scaling = {
        field: getattr(d.rope_scaling, field)
        for field in families.ROPE_FIELDS[d.rope_scaling.type]
        if d.rope_scaling.type != "yarn"
        or field in ("factor", "original_max_position_embeddings")
        or getattr(d.rope_scaling, field) != getattr(default, field)
    }
    kind = {"rope_type": d.rope_scaling.type.replace("none", "default")}
    return {
        "architectures": [families.DECODERS[family].architecture],  # llama.cpp needs it in a text_config too
        "model_type": family,
        **fields,
        "hidden_act": "silu",
        # The newer field, then the older ones, without which mlx-vlm assumes a base of a million.
        "rope_parameters": {**kind, "rope_theta": d.rope_theta, **scaling},
        "rope_theta": d.rope_theta,
        "rope_scaling": {**kind, **scaling} if scaling else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_weights(folder: Path, model: VLM, shard_bytes: int):
    """Write the weights under the names of the layout."""
    write_tensors(folder, weights.destinations(model.state_dict(), find_layout(model)), shard_bytes)


def write_tensors(folder: Path, tensors: Mapping[str, Sequence[Tensor]], shard_bytes: int):
    """Write model.safetensors, or several files of at most `shard_bytes` (but at least one tensor) and their index.

    The parts of each tensor are put together.
    """
    sizes = {name: sum(part.nbytes for part in parts) for name, parts in tensors.items()}
    shards, free = [], 0
    for name, size in sizes.items():
        if size > free or not shards:
            shards.append([])
            free = shard_bytes
        shards[-1].append(name)
        free -= size
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    if len(shards) == 1:
        files = {"model.safetensors": shards[0]}
    else:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, shard in files.items():
        whole = {
            name: tensors[name][0] if len(tensors[name]) == 1 else torch.cat(list(tensors[name])) for name in shard
        }
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors creates files that only their owner can read


if __name__ == "__main__":
    cli.run(main)
