"""A folder -> a repository on the hub, with a model card.

    python -m nanovlm.hub.push runs/demo OWNER/NAME                     its model, for nanovlm.load("OWNER/NAME")
    python -m nanovlm.hub.push runs/demo OWNER/NAME --checkpoints       and all with which train.py goes on elsewhere
    python -m nanovlm.hub.export runs/demo OUT_DIR --push OWNER/NAME    what was exported

The token is the one of `hf auth login`, or of HF_TOKEN; no command takes it. What is there already is not sent again:
this command goes on where it, or that of an export, was cut off.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import find_folder
from nanovlm.hub.card import model_card
from nanovlm.hub.model_folder import open_folder
from nanovlm.model.vlm import VLM

KINDS = ("*.safetensors", "*.gguf", "onnx/*.onnx")  # files of weights
MESSAGE = "written by nanovlm"


@dataclass(frozen=True)
class PushConfig:
    """Send a model, or a run with its checkpoints, to a repository on the hub."""

    # Run directory, or a folder with a model, an export or an adapter.
    source: Path
    # Repository, OWNER/NAME; made if there is none.
    repository: str
    # Also the settings, records and checkpoints of a run, in the folder run/ of the repository.
    checkpoints: bool = False
    # Make a repository that only its owner sees; one that exists stays as it is.
    private: bool = False


def main(args: list[str] | None = None):
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    options = (tyro.conf.PositionalRequiredArgs,)
    config = tyro.cli(PushConfig, args=args, prog="python -m nanovlm.hub.push", config=options)
    print(f"sent to {push(config.source, config.repository, config.checkpoints, config.private)}")


def push(source: str | Path, repository: str, checkpoints: bool = False, private: bool = False) -> str:
    """Send a folder to a repository; return its address. Raises UserError that names what is wrong, without secrets."""
    source = Path(source)
    check_name(repository)
    if not find_folder(source).is_dir():
        raise UserError(f"{source} is no folder: name a run, or a folder with a model, an export or an adapter")
    folder, run = source, source if (source / "checkpoints").is_dir() else None
    if (found := find_folder(source / "model")).is_dir():
        folder, run = found, source
    if checkpoints and run is None:
        raise UserError(f"checkpoints = True, but {source} is not the folder of a run with checkpoints")
    has_model = any(any(folder.glob(kind)) for kind in KINDS)
    if not has_model and not checkpoints:
        raise UserError(f"{folder} has no model: no {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    # Sent from memory: in the folder it would say the name of this repository wherever the folder is sent later.
    card = make_card(folder, repository, run) if has_model and not (folder / "README.md").exists() else None

    import huggingface_hub

    try:
        address = huggingface_hub.create_repo(repository, private=private or None, exist_ok=True)
        if has_model:
            _send(folder, repository, "")
        if card is not None:
            huggingface_hub.upload_file(
                path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository, commit_message=MESSAGE
            )
        if checkpoints:
            assert run is not None
            _send(run, repository, "run", ["model/*", "adapter/*"])
    except Exception as error:  # the client's own, those of its HTTP library and of its uploader
        token = huggingface_hub.get_token() or ""
        raise UserError(f"{repository} could not be written: {explain(error, token)}") from None
    return str(address)


def _send(folder, repository, place, left_out=()):
    import huggingface_hub

    huggingface_hub.upload_folder(
        repo_id=repository,
        folder_path=folder,
        path_in_repo=place,
        # Hidden files are temporary, or none of ours.
        ignore_patterns=[".*", "*/.*", *left_out],
        commit_message=MESSAGE,
    )


def check_name(repository: str):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository!r} is no name of a repository; it must be OWNER/NAME")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository on the hub: {error}") from None


def make_card(folder: Path, repository: str, run: Path | None) -> str:
    """Return the README.md of a model in our own layout, or of an adapter."""
    if (folder / "adapter_config.json").is_file():
        return f"---\nlibrary_name: peft\n---\n\n# {repository}\n\nAn adapter, written by nanovlm.\n"
    stored = open_folder(folder)
    with torch.device("meta"):
        model = VLM(stored.config).to(stored.dtype)
    is_complete = run is not None and (run / "metrics.jsonl").is_file()
    return model_card(repository, model, run if is_complete else None, "nanovlm")


ADVICE = {401: "log in with hf auth login", 403: "the token may not write there"}


def explain(error: Exception, token: str) -> str:
    """Return one line on an error of the client, without the token and without the signatures of addresses."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = ADVICE.get(status, "") if status else ""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [str(link).strip().partition("\n")[0] for link in chain]
    text = "; ".join(dict.fromkeys(line for line in (advice, *lines) if line)) or type(error).__name__
    text = text.replace(token, "...") if token else text  # whole, before a part of it is taken for another secret
    return re.sub(r"hf_\w+", "hf_...", re.sub(r"\?\S*", "", text))


if __name__ == "__main__":
    cli.run(main)
