"""README.md of an exported model: what it is, which programs read it, how it was trained, what it scores."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nanovlm.config import VLMConfig
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.engines import describe_engines
from nanovlm.hub.families import find_family
from nanovlm.model.vlm import VLM


def model_card(name: str, model: VLM, run: Path | None, layout: str = "hub", files: Sequence[str] = ()) -> str:
    """Return the README.md: the model, programs that read it and, given a run directory, its training and scores.

    `layout` is a key of USES, and `files` are the names of the GGUF files.
    """
    config = model.config
    library, use = USES[layout]
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'image-text-to-text' if config.vision is not None else 'text-generation'}",
        "---",
        "",
        f"# {name}",
        "",
        f"{describe(model)[0].upper()}{describe(model)[1:]}, written by nanovlm.",
        "",
        *use(name, config.vision is not None, files),
    ]
    if layout in ("hub", "gguf"):
        dtype = model.decoder.embed_tokens.weight.dtype
        lines += ["", "## Programs", "", *describe_engines(config, dtype, layout)]
    if run is not None:
        lines += ["", *_describe_run(run)]
    return "\n".join(lines) + "\n"


def _use_transformers(name, sees, _files):
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return [
        "```python",
        f"from transformers import {auto}, {'AutoProcessor' if sees else 'AutoTokenizer'}",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        f'{"processor = AutoProcessor" if sees else "tokenizer = AutoTokenizer"}.from_pretrained("{name}")',
        "```",
    ]


def _use_llama_cpp(_name, _sees, files):
    options = [f"{'--mmproj' if name.startswith('mmproj') else '-m'} {name}" for name in sorted(files, reverse=True)]
    return ["```", f"llama-server {' '.join(sorted(options))}", "```"]


def _use_vllm(name, _sees, _files):
    return [
        "```",
        "pip install --no-deps -e .  # in the repository of the code, with vLLM's pip",
        f"vllm serve {name}",
        "```",
    ]


def _use_nanovlm(name, _sees, _files):
    return ["```python", "import nanovlm", "", f'model, processor = nanovlm.load("{name}")', "```"]


def _describe_run(run):
    """Yield Markdown lines on training and scores, from config.json, metrics.jsonl and eval.json of a run."""
    config = read_json(run / "config.json")
    last = json.loads(((run / "metrics.jsonl").read_text().splitlines() or ["{}"])[-1])
    results = read_json(run / "eval.json") if (run / "eval.json").is_file() else {}
    where = results.get("environment", {})
    facts = {
        "data": ", ".join(map(_name_source, config.get("data", {}).get("sources", []))),
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "samples": last.get("samples"),
        "loss of the last step": None if last.get("loss") is None else f"{last['loss']:.4f}",
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


def _name_source(source):
    """Return a source without the folders of the machine on which the run was: a card is public."""
    return source if source.startswith("hub:") else Path(source).name or source


def count_weights(config: VLMConfig) -> int:
    """Return the number of weights, those in few bits among them."""
    with torch.device("meta"):
        return VLM(config).count_parameters()[0]


def describe(model: VLM) -> str:
    """Describe a model in one phrase: family, size and dtype."""
    size, config = count_weights(model.config), model.config
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    if config.quantization is not None:
        dtype = f"{config.quantization.format} and {dtype}"
    try:
        family = find_family(config.decoder)
        decoder = f"{family} decoder"
    except UserError:  # it has features that no published layout has
        family = decoder = "decoder of its own"
    if config.vision is None:
        return f"a {family} of {size / 1e6:.2f} M parameters in {dtype}"
    is_idefics3 = config.tiling.policy == "idefics3" and config.projector.type == "linear"
    return (
        f"{'an Idefics3' if is_idefics3 else 'a vision-language model'} with a {decoder}, {size / 1e6:.2f} M "
        f"parameters in {dtype}, tiles of {config.vision.image_size} pixels and {config.num_image_tokens} tokens"
    )


# The library that reads a layout, as the hub calls it, and lines that show how.
USES = {
    "hub": ("transformers", _use_transformers),
    "gguf": ("gguf", _use_llama_cpp),
    "nanovlm": ("nanovlm", _use_nanovlm),
    "vllm": ("vllm", _use_vllm),
}
