"""What a run starts with on several ranks: the weights of one rank, of which each has its own part alone in memory."""

import dataclasses
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.config import DecoderConfig, InitConfig, MoEConfig, ParallelConfig, TrainConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import export
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.train import init
from tests.conftest import TINY
from tests.test_distributed import finish, torchrun
from tests.train.test_init import DECODER, make_hub, stage

WORKER = """
import pickle, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from nanovlm import distributed
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.model.build import meta_model
from nanovlm.train import init, parallel
folder = Path(sys.argv[1])
def texts_of_the_first_rank():
    assert distributed.rank() == 0
    yield from sample_texts(Scenes("train"), 20)
with distributed.ranks(torch.device("cpu")) as device:
    for name, (config, layout) in pickle.loads((folder / "starts").read_bytes()).items():
        torch.manual_seed(config.seed)
        processor, fill = init.prepare(config, texts_of_the_first_rank())
        model = meta_model(config.model)
        parallel.parallelize(model, layout, device, "fp32", fill)
        weights = parallel.whole_tensors(model)
        texts = processor.tokenizer.to_str(), processor.chat_template
        seen = distributed.gather((*texts, torch.get_rng_state().tolist()))
        assert seen == seen[:1] * distributed.num_ranks(), name
        if distributed.rank() == 0:
            ours = {"rng": torch.get_rng_state(), "tokenizer": torch.tensor(list(seen[0][0].encode()))}
            save_file(weights | ours, folder / f"{name}, {distributed.num_ranks()} ranks.safetensors")
"""
LAYOUTS = {
    "ddp": ParallelConfig(),
    "fsdp": ParallelConfig(strategy="fsdp"),
    "fsdp in pairs": ParallelConfig(strategy="fsdp", shard_ranks=2),
    "ddp, shared experts": ParallelConfig(expert_ranks=2),
    "fsdp, shared experts": ParallelConfig(strategy="fsdp", expert_ranks=2),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """All that a run can start from; three experts, which two ranks cannot share, and four, which they can."""
    folder = tmp_path_factory.mktemp("starts")
    parts = stage(1, make_hub(folder), folder)
    model, processor = init.start(parts, ())
    save_model(folder / "dense", model, processor)

    def mixture(num_experts, noise=0.0):
        moe = MoEConfig(num_experts=num_experts, intermediate_size=DECODER["intermediate_size"], balance="bias")
        decoder = dataclasses.replace(parts.model.decoder, moe=moe)
        model = dataclasses.replace(parts.model, decoder=decoder)
        start = InitConfig(model=str(folder / "dense"), upcycle_noise=noise)
        return dataclasses.replace(parts, model=model, init=start)

    four = mixture(4, noise=0.1)
    model, processor = init.start(four, ())
    with torch.no_grad():
        model.decoder.layers[1].mlp.selection_bias.uniform_()
    save_model(folder / "mixture", model, processor)
    nothing = dataclasses.replace(parts, init=InitConfig(), model=TINY)
    other_vision = dataclasses.replace(TINY, vision=parts.model.vision)
    moe = dataclasses.replace(TINY.decoder, moe=MoEConfig(num_experts=6, intermediate_size=16, num_shared_experts=1))
    return {
        "nothing": nothing,
        "nothing, a mixture": dataclasses.replace(nothing, model=dataclasses.replace(TINY, decoder=moe)),
        "vision and decoder": parts,
        "vision": dataclasses.replace(nothing, init=InitConfig(vision=parts.init.vision), model=other_vision),
        "model": dataclasses.replace(parts, init=InitConfig(model=str(folder / "dense"))),
        "upcycled": mixture(3),
        "upcycled with noise": four,
        "mixture": dataclasses.replace(four, init=InitConfig(model=str(folder / "mixture"))),
    }


def test_a_run_starts_with_the_same_weights_on_four_ranks_as_on_one(starts, one_thread, tmp_path):
    """Bit for bit, as are the random numbers that come next; and the first rank alone makes the tokenizer."""
    jobs, ranks = {}, 4
    for name, config in starts.items():
        for way, layout in LAYOUTS.items():
            moe = config.model.decoder.moe
            if layout.expert_ranks == 1 or (moe is not None and moe.num_experts % 2 == 0):
                jobs[f"{name}, {way}"] = config, layout
    assert len(jobs) == 8 * 3 + 3 * 2
    (tmp_path / "starts").write_bytes(pickle.dumps(jobs))
    (tmp_path / "worker.py").write_text(WORKER)
    finish(torchrun(tmp_path / "worker.py", tmp_path, ranks=ranks))
    for config in starts.values():
        torch.manual_seed(config.seed)
        model, processor = init.start(config, sample_texts(Scenes("train"), 20))
        expected = model.state_dict() | {
            "rng": torch.get_rng_state(),
            "tokenizer": torch.tensor(list(processor.tokenizer.to_str().encode())),
        }
        for job in (job for job, (start, _layout) in jobs.items() if start is config):
            found = load_file(tmp_path / f"{job}, {ranks} ranks.safetensors")
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor, expected[key]), (job, key)


# --- memory ----------------------------------------------------------------------------------------------------

LARGE = TrainConfig(
    model=VLMConfig(
        vision=None,
        image_token_id=None,
        decoder=DecoderConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=15,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,
        ),
    )
)
LIMITED = """
import pickle, resource, sys, torch
from pathlib import Path
from nanovlm import distributed
from nanovlm.model.build import meta_model
from nanovlm.train import init, parallel
config = pickle.loads(Path(sys.argv[1]).read_bytes())
with distributed.ranks(torch.device("cpu")) as device:
    processor, fill = init.prepare(config, ["a red circle"])
    model = meta_model(config.model)
    size = sum(p.nbytes for p in model.parameters())
    lines = Path("/proc/self/status").read_text().splitlines()
    before = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
    limit = before + int(size / 1.2)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    parallel.parallelize(model, config.parallel, device, "fp32", fill)
    mine = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    print("filled", mine / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize(("source", "strategy"), [("nothing", "fsdp"), ("files", "fsdp"), ("nothing", "ddp")])
def test_a_model_of_more_than_a_ranks_memory_starts_sharded(large, tmp_path, source, strategy):
    """213 MB on two ranks that may take 177 MB each beyond what they have: with ddp, which needs all, it must fail."""
    (tmp_path / "worker.py").write_text(LIMITED)
    start = InitConfig(model=str(large) if source == "files" else "")
    config = dataclasses.replace(LARGE, init=start, parallel=ParallelConfig(strategy=strategy))
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    process = torchrun(tmp_path / "worker.py", tmp_path / "config")
    if strategy == "fsdp":
        out, _error = finish(process)
        assert out.split() == ["filled", "0.5"] * 2
    else:
        _out, error = finish(process, expected=1)
        assert "allocate memory" in error


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A large model as the hub has them: in several files, of which one at a time is mapped into memory."""
    folder = tmp_path_factory.mktemp("large")
    processor = Processor(train_tokenizer(sample_texts(Scenes("train"), 20), 512), CHAT_TEMPLATE, LARGE.model)
    save_model(folder / "own", VLM(LARGE.model), processor)
    export.export(folder / "own", folder / "hub", shard_bytes=20_000_000)
    assert len(list((folder / "hub").glob("*.safetensors"))) > 9
    yield folder / "hub"
    shutil.rmtree(folder)
