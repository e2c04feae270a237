"""Held-out records: the loss on them, for each source, and they as a source of their own, to ask about."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.loader import Loader
from nanovlm.data.reader import Reader
from nanovlm.data.source import Ref, first_pass
from nanovlm.data.types import Batch, Document
from nanovlm.model.dual import Dual
from nanovlm.model.joined import Joined
from nanovlm.model.vlm import VLM, Extras
from nanovlm.train.state import TrainState
from nanovlm.train.step import autocast, fill_up


def read_held_out(loaders: dict[str, Loader], config: TrainConfig) -> dict[str, list[list[Batch]]]:
    """Read and keep the first batches of the held-out split of each source: `{source: [this rank's share of a step]}`.

    `loaders` read this rank's micro-batches of that split once. All ranks get equally many batches; missing
    ones are padding.
    """
    held_out, steps = {}, max(1, config.eval.val_batches // config.optim.micro_batches)
    for name, loader in loaders.items():
        batches = list(itertools.islice(loader, steps))
        loader.close()
        most = max(distributed.gather(len(batches)))
        if not most:
            fraction = f"data.val_fraction = {config.data.val_fraction}"
            print(f"note: {fraction} holds out no record of {name}, so there is no validation loss for it")
        held_out[name] = [fill_up(step, config) for step in batches + [[]] * (most - len(batches))]
    return held_out


def loss_names(held_out: dict[str, list[list[Batch]]]) -> list[str]:
    """Return the names under which `validate` returns losses, that of all first."""
    read = [name for name, steps in held_out.items() if steps]
    return ["val_loss"] * bool(read) + [f"val_loss_{name}" for name in read if len(held_out) > 1]


class HeldOut:
    """The held-out records of one pass over some sources, in turns, as a source; `readers` are of the split `val`.

    They are those that give documents, so that the validation loss and a task on this source tell of the same ones.
    """

    name, damaged = "held-out records", ()

    def __init__(self, readers: list[Reader]):
        self.readers = readers
        self.shown: list[str] = []  # the source of each record of the last pass

    def refs(self, slots: Sequence[int], num_slots: int, start: Any = None) -> Iterator[Ref]:
        """Yield refs for a single slot, as `first_pass` asks for them; they end with the pass."""
        passes = [zip(itertools.repeat(k), first_pass(reader.source)) for k, reader in enumerate(self.readers)]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*passes))
        self.shown = []
        for k, ref in (turn for turn in turns if turn is not None):
            if isinstance(self.readers[k].read(ref.key), Document):
                self.shown.append(self.readers[k].source.name)
                yield ref._replace(key=(k, ref.key))

    def read(self, key: tuple) -> dict:
        k, of_source = key
        return self.readers[k].source.read(of_source)


def validate(state: TrainState, held_out: dict[str, list[list[Batch]]]) -> dict[str, float]:
    """Return the mean loss over the held-out units, `val_loss`, and of each of several sources, `val_loss_SOURCE`."""
    sums, device = {}, next(state.model.parameters()).device
    with evaluating(state):
        for name, steps in held_out.items():
            loss_and_units = torch.zeros(2, device=device)
            for batch in itertools.chain(*steps):
                loss_and_units[0] += state.objective.loss(state.replica, batch.to(device), Extras())
                loss_and_units[1] += state.objective.count(batch)
            sums[name] = distributed.add_up_tensor(loss_and_units)
    named = {f"val_loss_{name}": x for name, x in sums.items()} if len(sums) > 1 else {}
    named["val_loss"] = sum(sums.values(), torch.zeros(2, device=device))
    return {name: float(loss / units) for name, (loss, units) in named.items() if units}


@contextlib.contextmanager
def evaluating(state: TrainState) -> Iterator[None]:
    """Compute as an evaluation does: in the run's precision, without gradients, noise or compiling.

    An engine calls parts of the model, not the model as a whole, which would gather what FSDP shards at its root.
    """
    state.replica.eval()
    rounded = round_weights(state.model) if state.precision == "bf16" else contextlib.nullcontext()
    if isinstance(state.replica, FSDPModule):
        state.replica.unshard()
        rounded = contextlib.nullcontext()  # its policy rounds what it gathers
    with torch.no_grad(), autocast(state), torch.compiler.set_stance("force_eager"), rounded:
        yield
    if isinstance(state.replica, FSDPModule):
        state.replica.reshard()
    state.replica.train()


@contextlib.contextmanager
def round_weights(model: VLM | Dual) -> Iterator[None]:
    """Hold what autocast makes of fp32 weights of linear layers: in inference it would round them for every token anew.

    The parameters themselves, which wrappers and optimizers know, stay as they are beside, and are put back.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and name.split(".")[-1] not in ("router", "score")  # which compute in fp32
    ]
    parameters = [dict(layer._parameters) for layer in layers]
    for layer, own in zip(layers, parameters, strict=True):
        for name, x in own.items():
            if x is not None and x.dtype == torch.float32:
                layer._parameters[name] = nn.Parameter(x.detach().bfloat16(), requires_grad=False)
    decoder = None if isinstance(model, Dual) else model.decoder
    joined_head = decoder and decoder.joined_head
    if decoder and not joined_head and decoder.config.tie_word_embeddings:  # as embeddings the table stays in fp32
        weight = decoder.head_weight.detach().bfloat16()
        decoder.joined_head = Joined([decoder.head_layer], [len(weight)], weight, None)
    try:
        yield
    finally:
        for layer, own in zip(layers, parameters, strict=True):
            layer._parameters.update(own)
        if decoder:
            decoder.joined_head = joined_head
