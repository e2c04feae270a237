"""Model -> folder in a layout of the hub, which transformers and llama.cpp read (docs/hub.md has what was tried).

```
run or model folder --load--> model, processor --check_exportable--> files under a temporary name --> OUT_DIR
```

A vision-language model becomes an Idefics3, a language model one of the family that has its features. All files are
written by hand; fields that older and newer readers name differently are written in both ways. `transformers` is
needed by `check` alone, and only where it is installed.

    python -m nanovlm.hf export runs/demo OUT_DIR --check
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from nanovlm import hf
from nanovlm.checkpoint import merge_numbers, new_folder, read_json
from nanovlm.config import DecoderConfig, RopeScalingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import FAKE, marker_tokens
from nanovlm.data.tokenizer import COMPLETION_TEMPLATE, SPECIAL_TOKENS
from nanovlm.model.vlm import VLM
from nanovlm.sampling import find_stops

# transformers' Idefics3Processor looks for these, and would add what is missing with ids beyond the vocabulary.
IMAGE, IDEFICS3_TOKENS = "<image>", (FAKE, "<image>", "<end_of_utterance>")
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in the layout of the hub: Idefics3, or for a language model that of its family."""

    # Run directory, model folder, or repository of the hub.
    source: tyro.conf.Positional[str]
    # Folder to write; new or empty.
    out: tyro.conf.Positional[Path]
    # Read it again: compare all tensors, name the traps of other readers, compare with transformers where installed.
    check: bool = False
    # Precision of the weights; auto keeps that of the source.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Size of the largest file of weights, in GB; a larger model becomes several files.
    shard_size: float = 5.0


def main(args: list[str] | None = None):
    """Run the command line. Raises ValueError with one sentence for anything wrong with the input."""
    config = tyro.extras.subcommand_cli_from_dict({"export": ExportConfig}, args=args, prog="python -m nanovlm.hf")
    model = export(config.source, config.out, config.dtype, int(config.shard_size * 1e9))
    print(f"wrote {config.out}: {describe(model)}")
    if config.check:
        check(config.out, model)


def export(source: str | Path, out: str | Path, dtype: str = "auto", shard_bytes: int = 5_000_000_000) -> VLM:
    """Write the model of a run directory, a model folder or a repository to the folder `out`; return it.

    Raises ValueError, before anything is written, where `out` holds something and where the layout cannot hold the
    model.
    """
    source, out = Path(source), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: name a new one")
    if shard_bytes < 1:
        raise ValueError(f"shard_size = {shard_bytes / 1e9:g} must be above 0")
    folder = source / "model" if (source / "model" / "config.json").is_file() else source
    model, processor = hf.load(folder, dtype=None if dtype == "auto" else getattr(torch, dtype))
    check_exportable(processor)
    run = folder.resolve().parent if (folder.resolve().parent / "metrics.jsonl").is_file() else None
    with new_folder(out) as temporary:
        for name, content in make_files(model, processor).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(model_card(out.name, model, run), encoding="utf-8")
        processor.tokenizer.save(str(temporary / "tokenizer.json"))
        write_weights(temporary, model, shard_bytes)
    return model


def check_exportable(processor: Processor):
    """Raise ValueError that names the field that no layout can hold."""
    config, tokenizer = processor.config, processor.tokenizer
    if config.quantization is not None:
        raise ValueError(
            f"quantization.format = {config.quantization.format!r} cannot be exported: no other program reads it; "
            "export the model that it was made of"
        )
    find_family(config.decoder)
    if config.vision is None:
        return
    if config.tiling.policy != "idefics3":
        raise ValueError(
            f"tiling.policy = {config.tiling.policy!r} cannot be exported: other programs cut images as Idefics3 does; "
            "train with tiling.policy = idefics3"
        )
    if config.vision.grid_size in hf.IDEFICS3_BAD_GRIDS:
        raise ValueError(
            f"vision.image_size / vision.patch_size = {config.vision.grid_size} cannot be exported: Idefics3 gives "
            "some of so many patches a side one position"
        )
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    missing = [token for token in IDEFICS3_TOKENS if token not in added]
    if missing or added[IMAGE] != config.image_token_id:
        raise ValueError(
            f"the tokenizer cannot be exported: it needs the special tokens {', '.join(IDEFICS3_TOKENS)}, "
            + (f"but lacks {', '.join(missing)}" if missing else f"but image_token_id = {config.image_token_id}")
        )


def find_family(decoder: DecoderConfig) -> str:
    """Return the key of hf.DECODERS whose layout has all that this decoder has.

    Raises ValueError for a combination of features that no family has.
    """
    d = decoder
    if d.layers_without_rope:
        family = "smollm3"
    elif d.moe is not None:
        family = {"none": "mixtral", "head": "qwen3_moe", "all": "olmoe"}[d.qk_norm]
    elif d.qk_norm != "none":
        family = "qwen3"
    else:
        family = "qwen2" if d.qkv_bias and not d.o_bias else "llama"
    has_both = bool(d.layers_without_rope) and (d.qk_norm != "none" or d.moe is not None)
    wrong_bias = (d.qkv_bias != d.o_bias and family != "qwen2") or (d.qkv_bias and family == "mixtral")
    if has_both or wrong_bias or (d.qk_norm == "all" and family != "olmoe"):
        raise ValueError(
            f"no family of language models has decoder.qkv_bias = {d.qkv_bias}, o_bias = {d.o_bias}, qk_norm = "
            f"{d.qk_norm} and layers_without_rope = {d.layers_without_rope}{' in a mixture' if d.moe else ''}: llama, "
            "qwen3 (qk_norm = head) and smollm3 (layers_without_rope) have both biases or none, qwen2 the first alone; "
            "of the mixtures mixtral has no bias, qwen3_moe (qk_norm = head) and olmoe (all) both or none"
        )
    if d.moe is not None:
        expected = {"scores": "softmax", "num_shared_experts": 0, "routed_scaling_factor": 1.0, "capacity_factor": 0.0}
        expected |= {"norm_topk_prob": True} if family == "mixtral" else {"jitter": 0.0}
        for field, value in expected.items():
            if getattr(d.moe, field) != value:
                raise ValueError(
                    f"decoder.moe.{field} = {getattr(d.moe, field)} cannot be exported: {family} has {value}"
                )
        if d.moe.balance == "bias":
            raise ValueError(f"decoder.moe.balance = bias cannot be exported: {family} has no bias of experts")
        if family == "olmoe" and d.moe.intermediate_size != d.intermediate_size:
            raise ValueError(
                f"decoder.moe.intermediate_size = {d.moe.intermediate_size} cannot be exported: olmoe has one width, "
                f"decoder.intermediate_size = {d.intermediate_size}"
            )
    if family == "llama" and d.hidden_size % d.num_attention_heads:
        raise ValueError(
            f"decoder.num_attention_heads = {d.num_attention_heads} must divide decoder.hidden_size = {d.hidden_size}: "
            "transformers reads no other Llama"
        )
    return family


# ---- files ----


def make_files(model: VLM, processor: Processor) -> dict[str, dict | str]:
    """Return all files but weights, tokenizer and model card: JSON objects and texts by name."""
    config, tokenizer = model.config, processor.tokenizer
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    never = sorted({config.pad_token_id, config.image_token_id} - {*find_stops(config), None})
    template = {} if processor.chat_template == COMPLETION_TEMPLATE else {"chat_template": processor.chat_template}
    files = {
        "generation_config.json": {f"{name}_token_id": i for name, i in tokens.items()}
        | ({"eos_token_id": find_stops(config)} if config.stop_token_ids else {})
        # Padding and image tokens are never part of an answer, as in sampling.py.
        | ({"suppress_tokens": never} if never else {}),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": tokenizer.id_to_token(i) for name, i in tokens.items() if i is not None},
            "model_max_length": config.decoder.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **template,
        },
    }
    if template:
        files["chat_template.jinja"] = processor.chat_template
    if config.vision is None:
        files["config.json"] = make_text_config(config, dtype)
        return files
    files["config.json"] = make_idefics3_config(config, dtype)
    files["tokenizer_config.json"] |= {
        "processor_class": "Idefics3Processor",
        "additional_special_tokens": list(IDEFICS3_TOKENS),
    }
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
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_pad": True,
    }
    return files


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
            **{field: getattr(config.vision, field) for field in hf.VISION_FIELDS},
            **hf.FIXED_VISION,
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
    fields = {field: getattr(d, field) for field in hf.DECODER_FIELDS}
    if family not in ("llama", "qwen3") and d.head_dim * d.num_attention_heads == d.hidden_size:
        del fields["head_dim"]  # which those families leave out
    if family not in ("qwen2", "mixtral"):
        fields["attention_bias"] = d.qkv_bias
    if d.moe is not None:
        fields |= {theirs: getattr(d.moe, ours) for theirs, ours in hf.DECODERS[family].moe.items()}
    if family == "smollm3":
        fields["no_rope_layers"] = [int(i not in d.layers_without_rope) for i in range(d.num_hidden_layers)]
    default = RopeScalingConfig()
    scaling = {
        field: getattr(d.rope_scaling, field)
        for field in hf.ROPE_FIELDS[d.rope_scaling.type]
        if d.rope_scaling.type != "yarn"
        or field in ("factor", "original_max_position_embeddings")
        or getattr(d.rope_scaling, field) != getattr(default, field)
    }
    kind = {"rope_type": d.rope_scaling.type.replace("none", "default")}
    return {
        "architectures": [hf.DECODERS[family].architecture],  # llama.cpp needs it in a text_config too
        "model_type": family,
        **fields,
        "hidden_act": "silu",
        # The newer fields, then the older ones, without which mlx-vlm takes a base of a million.
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
    """Write model.safetensors, or several files of at most `shard_bytes` (but one tensor at least) and their index."""
    names = hf.find_names(find_family(model.config.decoder), model.config.vision is not None)
    tensors = hf.destinations(model, names)
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
        whole = {name: tensors[name][0] if len(tensors[name]) == 1 else torch.cat(tensors[name]) for name in shard}
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that nobody else can read


def model_card(name: str, model: VLM, run: Path | None) -> str:
    """Return README.md: what the model is and, of a run directory, how it was trained and what it scores."""
    config = model.config
    sees = config.vision is not None
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}",
        "---",
        "",
        f"# {name}",
        "",
        f"{describe(model)[0].upper()}{describe(model)[1:]}, written by nanovlm.",
        "",
        "```python",
        f"from transformers import {auto}, {'AutoProcessor' if sees else 'AutoTokenizer'}",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        f'{"processor = AutoProcessor" if sees else "tokenizer = AutoTokenizer"}.from_pretrained("{name}")',
        "```",
    ]
    if run is not None:
        lines += ["", *_describe_run(run)]
    return "\n".join(lines) + "\n"


def _describe_run(run):
    """Say what config.json, metrics.jsonl and eval.json of a run directory hold."""
    config = read_json(run / "config.json")
    last = json.loads(((run / "metrics.jsonl").read_text().splitlines() or ["{}"])[-1])
    results = read_json(run / "eval.json") if (run / "eval.json").is_file() else {}
    where = results.get("environment", {})
    facts = {
        "data": ", ".join(config.get("data", {}).get("sources", [])),
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "samples": last.get("samples"),
        "loss of the last step": f"{last['loss']:.4f}" if "loss" in last else None,
        "seed": config.get("seed"),
        "commit": config.get("commit"),
        "trained on": where.get("device"),
        "precision": where.get("precision"),
        "seconds": results.get("train_seconds"),
        "date": where.get("date"),
    }
    yield from ("## Training", "", "| | |", "|---|---|")
    for fact, value in facts.items():
        if value not in (None, ""):
            yield f"| {fact} | {value:,} |" if type(value) is int else f"| {fact} | {value} |"
    scores = {split: result for split, result in results.items() if isinstance(result, dict) and "kinds" in result}
    if scores:
        yield from ("", "## Scores", "", "Exact answers in percent.", "")
        kinds = list(dict.fromkeys(kind for result in scores.values() for kind in result["kinds"]))
        yield f"| split | mean | {' | '.join(kinds)} |"
        yield "|---" * (len(kinds) + 2) + "|"
        for split, result in scores.items():
            cells = [f"{100 * result['kinds'][k]['accuracy']:.1f}" if k in result["kinds"] else "" for k in kinds]
            yield f"| {split} | {100 * result['mean']:.1f} | {' | '.join(cells)} |"


def describe(model: VLM) -> str:
    """Say in a few words what a model is."""
    size, config = sum(p.numel() for p in model.parameters()), model.config
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    family = find_family(config.decoder)
    if config.vision is None:
        return f"a {family} of {size / 1e6:.2f} M parameters in {dtype}"
    return (
        f"an Idefics3 with a {family} decoder, {size / 1e6:.2f} M parameters in {dtype}, tiles of "
        f"{config.vision.image_size} pixels and {config.num_image_tokens} tokens"
    )


# ---- check ----


def check(folder: Path, model: VLM):
    """Read an exported folder, say what was compared, and name the traps that other programs have for it.

    Raises ValueError where a tensor differs from the model's by a bit, or transformers computes something else.
    """
    written, _ = hf.load(folder)
    tensors, expected = written.state_dict(), model.state_dict()
    different = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or not _same_bits(expected[name], tensors[name])
    ]
    if different:
        raise ValueError(f"{folder} differs from the model in {', '.join(merge_numbers(different))}")
    print(f"{len(tensors)} tensors are equal bit for bit")
    del written, tensors
    ours, processor = hf.load(folder, dtype=torch.float32)
    for trap in find_traps(processor):
        print(f"note: {trap}")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: nothing was compared with it")
        return
    for line in compare_with_transformers(folder, ours, processor):
        print(line)


def find_traps(processor: Processor) -> list[str]:
    """Name what other programs may read differently; what would be wrong everywhere is refused or written right."""
    config, tokenizer = processor.config, processor.tokenizer
    d, traps = config.decoder, []
    if d.head_dim not in VLLM_CPU_HEAD_SIZES:
        known = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
        traps.append(f"vLLM on a CPU has no attention for decoder.head_dim = {d.head_dim}; it has {known}")
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS):
        traps.append(
            "llama.cpp's converter knows tokenizers by a hash, and not one made here: name its pre-tokenizer, smollm"
        )
    if config.vision is None:
        return traps
    if (family := find_family(d)) != "llama":
        traps.append(
            f"the decoder is a {family}: vLLM (but for --model-impl transformers) and mlx-vlm read an Idefics3 with a "
            "llama only, llama.cpp another one when its decoder is converted as a model of its own"
        )
    if len(tokenizer.encode("\n\n", add_special_tokens=False).ids) != 1:
        traps.append('llama.cpp looks up the token "\\n\\n", which the tokenizer does not have')
    if config.tiling.longest_edge <= config.vision.image_size:
        traps.append(
            f"tiling.longest_edge = {config.tiling.longest_edge} makes every image one tile of vision.image_size = "
            f"{config.vision.image_size}: llama.cpp shows it twice, as a grid of one tile and as a whole"
        )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    plain = [token for token in marker_tokens(config) if token not in added]
    if plain:
        traps.append(f"the tokenizer has no tokens for {', '.join(plain)}: they are several tokens of plain text")
    if _depends_on_content_type(processor):
        traps.append("the chat template writes another text beside an image than beside the marker that llama.cpp sets")
    return traps


def _depends_on_content_type(processor):
    """Whether the template's text differs between an image part and a text part that holds the image token."""
    texts = set()
    for first in ({"type": "image"}, {"type": "text", "text": IMAGE}):
        messages = [{"role": "user", "content": [first, {"type": "text", "text": "?"}]}]
        tokens = {
            f"{name}_token": processor.tokenizer.id_to_token(i)
            for name, i in (("bos", processor.config.bos_token_id), ("eos", processor.config.eos_token_id))
            if i is not None
        }
        texts.add(processor.template.render(messages=messages, add_generation_prompt=True, **tokens))
    return len(texts) > 1


@torch.no_grad()
def compare_with_transformers(folder: Path, ours: VLM, processor: Processor) -> list[str]:
    """Ask transformers and our model, both in fp32, the same; return what was compared and how far they differ.

    Raises ValueError where tensors are missing, token ids differ, or logits by more than 1e-4 of the largest.
    """
    import transformers

    sees = ours.config.vision is not None
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    theirs, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {kind: sorted(keys) for kind, keys in loading.items() if keys}:
        raise ValueError(f"transformers does not find its tensors in {folder}: {wrong}")
    their_processor = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(folder)
    lines = []
    for width, height in ((128, 80), (60, 60), (40, 100)) if sees else ((0, 0),):
        image = _gradient(width, height) if sees else None
        content = [{"type": "image", "image": image}] if sees else []
        question = {"type": "text", "text": "What is in this image, 1 or 2 things?"}
        batch = processor([{"role": "user", "content": [question]}], [image] if sees else [])
        if their_processor.chat_template is None:
            inputs = their_processor(question["text"], add_special_tokens=False, return_tensors="pt")
        else:
            messages = [{"role": "user", "content": [*content, question] if sees else question["text"]}]
            inputs = their_processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        what = f"an image of {width} x {height}" if sees else "a question"
        if inputs["input_ids"].tolist() != batch.input_ids.tolist():
            raise ValueError(
                f"transformers gives {what} the tokens {inputs['input_ids'].tolist()[0]}, not "
                f"{batch.input_ids.tolist()[0]}"
            )
        ours_logits, their_logits = ours.logits(batch), theirs(**inputs).logits
        difference = (ours_logits - their_logits).abs().max() / their_logits.abs().max()
        line = f"{what}: {batch.input_ids.shape[1]} equal tokens, "
        if sees:
            pixels = (inputs["pixel_values"].flatten(0, 1) - batch.pixel_values).abs().max()
            line += f"{len(batch.pixel_values)} tiles whose pixels differ by at most {pixels:.1e}, "
        lines.append(line + f"logits that differ from transformers' by at most {difference:.1e} of the largest")
        if not difference <= 1e-4:
            raise ValueError(lines[-1])
    return lines


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _gradient(width, height):
    """An image whose every pixel is different."""
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return Image.fromarray(torch.stack((2 * row, col, row + col), -1).clamp(0, 255).to(torch.uint8).numpy())
