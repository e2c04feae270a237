"""Pictures and texts -> what a dual model reads: squares of pixels, and each text as a document.

A text has the special tokens that its tokenizer.json puts around it (CLIP: both ends, SigLIP: the end), and is cut or
padded as the config says; what it spells itself is never a special token.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from nanovlm.config import DualConfig
from nanovlm.data.images import to_rgb
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.tilings import cut_middle
from nanovlm.data.tokenizer import SPECIAL_TOKENS, read_tokenizer, train_tokenizer
from nanovlm.data.types import IGNORE, Batch, Document, Sample
from nanovlm.errors import UserError
from nanovlm.files import write_file

ROW_LENGTH = 256  # tokens in a row of texts that are embedded together
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class DualProcessor:
    """Everything between pictures and texts on one side and a dual model's tensors on the other."""

    def __init__(self, tokenizer: Tokenizer, config: DualConfig):
        """Raise UserError where the tokenizer does not fit the config."""
        self.config, text = config, config.text
        self.tokenizer = tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
        if (needed := max(tokenizer.get_vocab().values(), default=-1) + 1) > text.vocab_size:
            raise UserError(
                f"the tokenizer has tokens up to id {needed - 1}, and so needs {needed} embeddings, more than "
                f"dual.text.vocab_size = {text.vocab_size}"
            )
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.enable_truncation(text.max_position_embeddings)
        if text.is_padded:
            pad = tokenizer.id_to_token(config.pad_token_id) or ""
            tokenizer.enable_padding(length=text.max_position_embeddings, pad_id=config.pad_token_id, pad_token=pad)

    @classmethod
    def load(cls, folder: str | Path, config: DualConfig) -> "DualProcessor":
        """Read the tokenizer.json of a folder."""
        return cls(read_tokenizer(Path(folder) / "tokenizer.json"), config)

    def save(self, folder: Path):
        """Write tokenizer.json."""
        write_file(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))

    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Bring pictures of any size to the size of the image tower: uint8[I, 3, S, S]."""
        side = self.config.tile_size
        if not images:
            return torch.empty(0, 3, side, side, dtype=torch.uint8)
        squares = [RESIZE[self.config.resize](to_rgb(x), side, RESAMPLE[self.config.resample]) for x in images]
        return torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])

    def encode_texts(self, texts: list[str]) -> Batch:
        """Turn texts into documents in rows, in their order, without pictures."""
        documents = [self.text_document(text) for text in texts]
        rows, length = [[]], max([ROW_LENGTH, *map(len, documents)])
        for document in documents:
            if sum(map(len, rows[-1])) + len(document) > length:
                rows.append([])
            rows[-1].append(document)
        width = max(sum(map(len, row)) for row in rows)
        return collate([make_row(row, width, self.config.pad_token_id) for row in rows])

    def text_document(self, text: str, images: tuple[Image.Image, ...] = ()) -> Document:
        """Turn a text into a document, and the pictures that it is about into its tiles."""
        ids = self.tokenizer.encode(text).ids
        if not ids:
            raise UserError("a text is empty, and the tokenizer writes no token that could stand for it")
        return Document(
            input_ids=torch.tensor(ids),
            labels=torch.full((len(ids),), IGNORE),
            branch_ids=torch.zeros(len(ids), dtype=torch.int32),
            tiles=self.encode_images(list(images)),
        )

    def find_padding(self, ids: Tensor) -> Tensor:
        """Return which tokens of texts, int64[J, L], are padding: bool[J, L].

        Where padding and the end of a text are the same token, as in SigLIP, the first of them is the end.
        """
        if not self.config.text.is_padded:
            return torch.zeros_like(ids, dtype=torch.bool)
        is_padding = (ids == self.config.pad_token_id).flip(1).cumprod(1).flip(1).bool()
        nothing = self.tokenizer.encode("")
        if self.config.pad_token_id in nothing.ids[: sum(nothing.attention_mask)]:
            is_padding &= torch.nn.functional.pad(is_padding, (1, -1))
        return is_padding

    def document(self, sample: Sample) -> Document:
        """Turn a sample of a picture and its caption, the first answer or text in it, into a document."""
        if len(sample.images) != 1:
            raise UserError(f"the record has {len(sample.images)} pictures: contrast learns from one and its caption")
        caption = next(_text(m["content"]) for m in sample.messages if m["role"] in ("assistant", "text"))
        if not caption.strip():
            raise UserError("the caption of the record is empty")
        return self.text_document(caption.strip(), tuple(sample.images))


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer that ends every text with a token of its own."""
    tokenizer = train_tokenizer(texts, vocab_size)
    end = SPECIAL_TOKENS[2]
    tokenizer.post_processor = TemplateProcessing(f"$A {end}", None, [(end, tokenizer.token_to_id(end))])
    return tokenizer


def _text(content) -> str:
    """Return the text of a message, without the pictures among it."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# --- a picture of any size -> a square -------------------------------------------------------------------------


def stretch(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize to a square, whatever the shape (SigLIP)."""
    return image.resize((side, side), resample)


RESIZE = {"stretch": stretch, "crop": cut_middle}
