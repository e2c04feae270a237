"""The name of a model -> a folder with its files, downloaded if the name is a repository on the hub."""

import re
from pathlib import Path

from nanovlm.errors import UserError
from nanovlm.files import find_folder, read_json

# Files to download from a repository.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "adapter_config.json",  # of a repository that is an adapter
    "adapter_model.safetensors",
)
TOKENIZER_FILES = tuple(name for name in FILES if "safetensors" not in name)
# Short names of repositories; a folder of the same name goes before them.
SHORT_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "siglip-b16-512": "google/siglip-base-patch16-512",
    "siglip2-b16-512": "google/siglip2-base-patch16-512",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}


def find(name: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """Return the folder of this name, or one with the downloaded files of a repository.

    A repository is `owner/name[@revision]`, or one of SHORT_NAMES, which may have a revision too.
    """
    if (folder := find_folder(Path(name))).is_dir():
        return folder
    repository, _, revision = str(name).partition("@")
    repository = SHORT_NAMES.get(repository, repository)
    nowhere = f"there is no model folder {name}, and no repository on the hub can have that name"
    if "/" not in repository:
        nowhere += f"; short names are smollm2, {', '.join(SHORT_NAMES)}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(nowhere)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=[*files]))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on the hub, then log in with hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder and no public repository {repository}; for a private one log in with hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise UserError(nowhere) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"there is no folder {name}, and the hub cannot be reached for the repository {repository}: check the "
            f"network, or give a folder that holds its files ({reason})"
        ) from error


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter in PEFT's layout and no model."""
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def refuse_adapter(folder: Path):
    """Raise UserError for a folder with an adapter and no model."""
    if holds_adapter(folder):
        adapter = read_json(folder / "adapter_config.json")
        base = adapter.get("base_model_name_or_path")
        raise UserError(
            f"{folder} is no model but an adapter ({adapter.get('peft_type')})"
            + (f" for {base}" if base else "")
            + f": name its model and beside it the adapter, or merge it: python -m nanovlm.hub.merge MODEL {folder} OUT"
        )


def find_weights(folder: Path) -> list[Path]:
    """List the safetensors files of a folder. Raises UserError that names what is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise UserError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json"
            + (f"; {', '.join(others)} could run any code when read: convert it to safetensors" if others else "")
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no weight_map from tensors to files") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]
