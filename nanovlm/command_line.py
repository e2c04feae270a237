"""What train.py and generate.py are asked: arguments -> config.

Imports nothing that takes seconds, so that --help and a mistake are answered at once, also where torch is missing.
"""

import dataclasses
import importlib.util
import itertools
import re
import runpy
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanovlm.config import MoEConfig, SamplingConfig, TrainConfig, VideoConfig, pick
from nanovlm.config.fields import comments
from nanovlm.errors import UserError
from nanovlm.presets import PRESETS

# The fields that --help shows; --help-all shows all.
USUAL = (
    "run_dir",
    "data.sources",
    "data.val_fraction",
    "data.num_epochs",
    "data.num_workers",
    "data.row_length",
    "data.batch_rows",
    "model.tiling.max_tiles",
    "init.model",
    "optim.steps",
    "optim.lr",
    "optim.micro_batches",
    "optim.freeze",
    "eval.tasks",
    "eval.every",
    "parallel.strategy",
    "device",
    "precision",
    "seed",
    "checkpoint_every",
    "wandb",
)
# Packages of pyproject.toml, by the names under which they are imported.
NEEDED = (
    *("torch", "tyro", "PIL", "numpy", "einops", "jinja2", "safetensors", "tokenizers", "tqdm"),
    *("matplotlib", "huggingface_hub", "fsspec", "yaml"),
)


@dataclass(frozen=True)
class GenerateConfig:
    # A model folder, as train.py writes it or in a layout of the hub; a repository of the hub, owner/name[@revision];
    # a .gguf file; or smollm2, a language model from a package.
    model: str
    # Image files, in the order in which the model sees them.
    image: tuple[Path, ...] = ()
    # Questions about the images; several are answered at a time. Without any: a chat.
    prompt: tuple[str, ...] = ()
    # A video file, in place of images: .mp4, .webm or .gif, of which some frames are shown. Needs the extra `video`.
    video: Path | None = None
    # Which frames are shown of it.
    frames: VideoConfig = field(default_factory=VideoConfig)
    # The folder of an index of documents or pictures (python -m nanovlm.search): each prompt is answered from the
    # passages that are found for it, which are shown beside the answer. What a model thinks first is left out.
    documents: Path | None = None
    # How many passages a prompt is answered from.
    num_passages: int = 3
    # How many answers to each prompt, each drawn with a seed of its own: the seed, the seed + 1, ...
    num_answers: int = 1
    # Print one JSON object for each answer: text, token counts, why it ended, times, speed, memory.
    json: bool = False
    # Print which experts the tokens of each answer went to (of a mixture of experts).
    show_routing: bool = False
    # Draw where each token of the answer looked into this PNG file: the attention of the query that predicts the token
    # to the tokens of the picture, the mean of all layers and heads. Takes one --prompt.
    show_attention: Path | None = None
    # Draw this layer alone, counted from 0.
    attention_layer: int | None = None
    # Draw this query head alone, counted from 0.
    attention_head: int | None = None
    # Draw the boxes and points that the answer names on the picture, into this PNG file. Takes one --prompt and one
    # --image.
    draw: Path | None = None
    # Leave out this share of the image tokens, those that the question looks at least, in all blocks after the first
    # few: a longer picture in less time and memory, with other answers (FastV). One prompt at a time.
    prune_image_tokens: float = 0.0
    # How many blocks have all image tokens.
    prune_after: int = 2
    # How to choose tokens.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Precision of the weights; auto takes that of the file.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Quantise the decoder's linear layers to this format; `python -m nanovlm.quant` writes a folder.
    quantize: Literal["none", "int8", "int4", "nf4", "fp8"] = "none"
    # An adapter of the model, in PEFT's layout: a folder, such as the adapter/ of a run, or a repository of the hub.
    adapter: str = ""
    # Compile the steps that make a token of each answer, which takes a minute: worth it for many tokens.
    compile: bool = False
    # At most this many answers are made at a time.
    num_rows: int = 16
    # How many tokens, prompts included, the cache has room for; 0 for what suits num_rows.
    cache_tokens: int = 0
    # What the cache keeps of each number of keys and values: itself, or a code of 8 or 4 bits, in a fraction of the
    # memory and nearly, in 4 bits not always, with the same answers. The cache of a draft keeps the numbers themselves.
    cache_format: Literal["float", "int8", "int4"] = "float"
    # Who guesses the next tokens, so that one pass gives several; no greedy token changes. `lookup` guesses what
    # followed the same words before; else a smaller model with the same tokenizer, as for --model. Empty for nobody.
    draft: str = ""
    # How many tokens are guessed at a time; 4 if not given.
    draft_tokens: int | None = None

    def validate(self) -> "GenerateConfig":
        """Return self, or raise UserError that names a value and what would be right."""
        self.sampling.validate()
        self.frames.validate("--")
        if self.video is not None:
            others = {"--image": self.image, "--documents": self.documents is not None}
            others |= {"--draw": self.draw is not None, "--show-attention": self.show_attention is not None}
            others |= {"no --prompt, which is a chat": not self.prompt}
            if names := [name for name, is_given in others.items() if is_given]:
                raise UserError(f"--video does not go with {', '.join(names)}")
        if self.json and not self.prompt:
            raise UserError("--json needs a --prompt; a chat has no JSON form")
        if self.show_routing and self.json:
            raise UserError("--show-routing prints tables, which have no JSON form: leave it or --json out")
        if self.show_routing and not self.prompt:
            raise UserError("--show-routing needs a --prompt; it shows nothing in a chat")
        if self.documents is not None and not self.prompt:
            raise UserError("--documents answers a --prompt from documents; a chat does not look for any")
        least_values = {"num_answers": 1, "num_passages": 1, "num_rows": 1, "cache_tokens": 0, "draft_tokens": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if not 0 <= self.prune_image_tokens <= 1:
            raise UserError(f"--prune-image-tokens {self.prune_image_tokens} must be a share from 0 to 1")
        if self.prune_image_tokens:
            others = {"--json": self.json, "--draft": self.draft, "--compile": self.compile}
            others |= {"--documents": self.documents is not None}
            others |= {"--num-answers": self.num_answers > 1, "--show-attention": self.show_attention is not None}
            others |= {"--draw": self.draw is not None}
            others |= {"--show-routing": self.show_routing, "--adapter": self.adapter, "no --prompt": not self.prompt}
            others |= {"--cache-format": self.cache_format != "float"}
            if names := [name for name, is_given in others.items() if is_given]:
                raise UserError(f"--prune-image-tokens does not go with {', '.join(names)}")
        if self.draft_tokens is not None and not self.draft:
            raise UserError("--draft-tokens says how many tokens a --draft guesses: add it")
        if self.num_answers > 1 and not self.prompt:
            raise UserError(f"--num-answers {self.num_answers} needs a --prompt; a chat has one answer a turn")
        if self.num_answers > 1 and self.sampling.temperature == 0:
            raise UserError(f"--num-answers {self.num_answers} would all be equal at temperature 0: add --temperature")
        if self.draw is not None:
            self._check_picture("--draw", self.draw, "draws what the answer names on a picture")
            if len(self.image) != 1:
                raise UserError(f"--draw draws on one picture, not on {len(self.image)}: give one --image")
        if self.show_attention is None:
            if self.attention_layer is not None or self.attention_head is not None:
                raise UserError("--attention-layer and --attention-head say what --show-attention FILE draws: add it")
            return self
        self._check_picture("--show-attention", self.show_attention, "draws attention over a picture")
        if self.cache_format != "float":
            raise UserError(
                f"--show-attention computes with whole keys and values, and answers of --cache-format "
                f"{self.cache_format} were not made so: leave one of the two out"
            )
        return self

    def _check_picture(self, option: str, path: Path, does: str):
        """Raise UserError that names the option unless an answer can be drawn into its file."""
        if not self.image:
            raise UserError(f"{option} {does}, but there is none: add --image FILE")
        if len(self.prompt) != 1:
            raise UserError(f"{option} draws the answer to one --prompt, not to {len(self.prompt)}")
        if self.num_answers > 1:
            raise UserError(f"{option} draws one answer, not {self.num_answers}")
        if path.suffix.lower() != ".png":
            raise UserError(f"{option} writes a PNG file: let the name {path} end in .png")
        if path.resolve() in [image.resolve() for image in self.image]:
            raise UserError(f"{option} would write over the picture {path}: give another name")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{option}: there is no folder {path.absolute().parent}")


def parse_generate(args: list[str], about: str | None = None) -> GenerateConfig:
    """Read `--model M [--option value ...]`; `about` is shown by --help."""
    check_packages()
    import tyro

    # The options of sampling have no prefix.
    return tyro.cli(GenerateConfig, args=args, description=about, config=(tyro.conf.OmitArgPrefixes,))


def parse_train(args: list[str], about: str | None = None) -> TrainConfig:
    """Read `[preset] [--field value ...]`; without a preset, the config of the run in --run-dir, or else scenes.

    `about` is shown by --help. Raises UserError for an unknown preset.
    """
    check_packages()
    import tyro

    args = [_with_hyphens(arg) for arg in args]
    if args and not args[0].startswith("-"):
        recipe, args = pick(PRESETS, args[0], "preset")(), args[1:]
    else:
        recipe = read_run(args) or PRESETS["scenes"]()
    about, program = f"{about or ''}\n{list_presets()}", f"{Path(sys.argv[0]).name} [preset]"
    if {"-h", "--help"} & set(args):
        print(f"usage: {program} [--field value ...]\n\n{describe(recipe, about)}")
        sys.exit()
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    # Naming one of its fields switches the mixture of experts on; the help shows them too.
    if recipe.model.decoder.moe is None and any(a.startswith(("--model.decoder.moe.", "--help")) for a in args):
        decoder = dataclasses.replace(recipe.model.decoder, moe=MoEConfig())
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, decoder=decoder))
    if "--help" not in args:
        recipe = start_from_model(recipe, args)
    if values(args, "--model.vision")[-1:] == ["None"]:  # a language model: tyro cannot take a whole part away
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision=None, image_token_id=None))
        args = without(args, "--model.vision")
    # Naming one of its fields adds a second encoder, which is as the first in all others; the help shows them too.
    vision, names_second = recipe.model.vision, any(a.startswith(("--model.vision.second.", "--help")) for a in args)
    if vision is not None and vision.second is None and names_second:
        vision = dataclasses.replace(vision, second=vision)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision=vision))
    if values(args, "--data.sources"):  # the preset's lessons and tasks fit its own data
        data, judged = dataclasses.replace(recipe.data, lessons=()), dataclasses.replace(recipe.eval, tasks=())
        recipe = dataclasses.replace(recipe, data=data, eval=judged)
    return tyro.cli(
        TrainConfig,
        args=args,
        prog=program,
        default=recipe,
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )


def read_run(args: list[str]) -> TrainConfig | None:
    """Return the config of the run in --run-dir; None without one named. Raises UserError if it took no step."""
    folders = values(args, "--run-dir")
    if not folders or {"-h", "--help", "--help-all"} & set(args):
        return None
    if not Path(folders[-1], "config.json").exists():
        if Path(folders[-1], "checkpoints").exists():  # what is lost is named when the run is read
            return None
        presets = ", ".join(PRESETS)
        raise UserError(f"there is no run in {folders[-1]} to go on with; to begin one, name a preset first: {presets}")
    from nanovlm.train.resume import read_config, steps_taken  # takes seconds

    if not steps_taken(Path(folders[-1])):
        raise UserError(f"{folders[-1]} took no step: name its preset again, one of {', '.join(PRESETS)}")
    return read_config(Path(folders[-1]))


def start_from_model(recipe: TrainConfig, args: list[str]) -> TrainConfig:
    """Return a recipe with the model of --init.model, or of its own init.model, in place of its own.

    A run that started from there and took steps is asked instead: the model may be gone by now. Raises UserError for
    options about an image encoder that the model lacks.
    """
    given = values(args, "--init.model")
    name, run_dir = [recipe.init.model, *given][-1], Path([recipe.run_dir, *values(args, "--run-dir")][-1])
    if not name:
        return recipe
    if given:  # it brings all parts
        recipe = dataclasses.replace(recipe, init=dataclasses.replace(recipe.init, vision="", second="", decoder=""))
    recipe = dataclasses.replace(recipe, init=dataclasses.replace(recipe.init, model=name))
    from nanovlm.train.init import take_model  # takes seconds
    from nanovlm.train.resume import read_config, steps_taken

    saved = read_config(run_dir) if (run_dir / "config.json").is_file() and steps_taken(run_dir) else None
    recipe = take_model(recipe, saved.built if saved and saved.init.model == name else None)
    about_vision = [arg for arg in args if arg.startswith("--model.vision.")]
    if recipe.model.vision is None and about_vision:
        raise UserError(f"init.model = {name!r} is a language model, without an image encoder for {about_vision[0]}")
    return recipe


def values(args: list[str], option: str) -> list[str]:
    """Return the first value of an option, as `--option value` or `--option=value`, each time that it is given."""
    found = []
    for arg, value in itertools.pairwise([*args, ""]):
        name, is_joined, joined = arg.partition("=")
        if name == option:
            found.append(joined if is_joined else value)
    return found


def without(args: list[str], option: str) -> list[str]:
    """Leave an option and its one value out."""
    before = ["", *args]
    return [arg for last, arg in itertools.pairwise(before) if last != option and arg.partition("=")[0] != option]


def _with_hyphens(arg: str) -> str:
    """Return an option by its usual name: --data.row_length and --data.row-length are one."""
    name, *value = arg.split("=", 1)
    return "=".join([name.replace("_", "-"), *value]) if name.startswith("--") else arg


# --- help on one screen -----------------------------------------------------------------------------------------


def list_presets() -> str:
    lines = (f"    {name:<21} {(function.__doc__ or '').splitlines()[0]}" for name, function in PRESETS.items())
    return "Presets, named before the options:\n\n" + "\n".join(lines)


def describe(config: TrainConfig, about: str) -> str:
    """Lay out the usual fields, with their values in the preset and the first sentence about each."""
    lines = [about, "\nOften set, with the values of this preset or run (--help-all lists every field):\n"]
    for name in USUAL:
        *parts, last = name.split(".")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        value = getattr(owner, last)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = "(as init.model)" if name.startswith("model.") and config.init.model else shown
        name = name.replace("_", "-")
        if isinstance(value, bool):  # --wandb is said without a value
            name, shown = (f"no-{name}", "") if value else (name, "")
        sentence = re.split(r"(?<=[.;]) ", comments(type(owner))[last])[0].rstrip(".;")
        option = f"  --{name} {shown if len(shown) <= 40 - len(name) else shown[: 36 - len(name)] + ' ...'}"
        lines.append(f"{option:<46}{textwrap.shorten(sentence, 74, placeholder=' ...')}")
    return "\n".join(lines)


# --- commands ---------------------------------------------------------------------------------------------------


def check_packages():
    """Raise UserError that names this Python if a package is missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{sys.executable} has no {', '.join(missing)}: activate the environment that has nanovlm "
            "(make demo and make test write one: . .venv/bin/activate), or pip install -c constraints.txt -e ."
        )


def train():
    """Run train.py, as the command nanovlm-train."""
    runpy.run_module("train", run_name="__main__")


def generate():
    """Run generate.py, as the command nanovlm-generate."""
    runpy.run_module("generate", run_name="__main__")


def evaluate():
    """Run eval/run.py, as the command nanovlm-eval."""
    runpy.run_module("nanovlm.eval.run", run_name="__main__")
