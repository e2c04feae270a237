"""The name of a draft -> what guesses for an engine."""

import nanovlm
from nanovlm.data.chat import Processor
from nanovlm.infer.draft_model import DraftModel, check_vocabulary
from nanovlm.infer.speculate import Draft, PromptLookup
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM


def open_draft(name: str, num_tokens: int | None, model: VLM, processor: Processor) -> Draft | None:
    """Return what guesses `num_tokens` at a time for a model: none for "", a look-up, or else the model of this name.

    It guesses 4 for None. Raises UserError for a draft with another tokenizer.
    """
    if not name:
        return None
    num_tokens = 4 if num_tokens is None else num_tokens
    if name == "lookup":
        return PromptLookup(num_tokens)
    weight = model.decoder.embed_tokens.weight
    small, other = nanovlm.load(name, weight.device, weight.dtype)
    check_vocabulary(processor.tokenizer, other.tokenizer)
    return DraftModel(prepare(small), num_tokens)
