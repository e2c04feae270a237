"""Two ranks on the CPU: the same gradients and updates as one, and runs that survive whatever happens to a rank."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

import nanovlm
import train
from nanovlm import distributed
from nanovlm.config import (
    EvalConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    ProjectorConfig,
    TrainConfig,
)
from nanovlm.model.vlm import VLM
from nanovlm.objectives import NextToken
from nanovlm.train import checkpoint, parallel
from nanovlm.train.optim import make_optimizers
from tests.conftest import TINY, make_batch, make_document
from tests.test_train import SMALL, comparable, metrics

ROOT = Path(__file__).parent.parent
LIMIT_S = 1800  # after which processes hang; a slow machine with one core takes minutes
MOE = MoEConfig(num_experts=4, intermediate_size=16, num_shared_experts=1, balance_weight=0.5, experts="loop")
MIXTURE = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE))
SECOND = dataclasses.replace(TINY.vision, patches="convolution", positions="rotary", hidden_size=16)
VISION = dataclasses.replace(TINY.vision, class_token=True, num_registers=2, layer_scale=True, second=SECOND)
ENCODERS = dataclasses.replace(TINY, vision=VISION)
DENSE_FIRST = dataclasses.replace(
    TINY,
    projector=ProjectorConfig(type="resampler", num_tokens=4),
    decoder=dataclasses.replace(TINY.decoder, moe=dataclasses.replace(MOE, layers=(1,))),
)
# What is spread how; each must compute what one rank computes.
LAYOUTS = {
    "ddp": (TINY, ParallelConfig()),
    "fsdp": (TINY, ParallelConfig(strategy="fsdp")),
    "fsdp, gathered once": (TINY, ParallelConfig(strategy="fsdp", reshard_after_forward=False)),
    "fsdp of copies": (TINY, ParallelConfig(strategy="fsdp", shard_ranks=1)),
    "fsdp, all computed again": (TINY, ParallelConfig(strategy="fsdp", checkpointing="full")),
    "ddp, most computed again": (TINY, ParallelConfig(checkpointing="selective")),
    "mixture, ddp": (MIXTURE, ParallelConfig()),
    "mixture, fsdp": (MIXTURE, ParallelConfig(strategy="fsdp")),
    "mixture, ddp, shared experts": (MIXTURE, ParallelConfig(expert_ranks=2)),
    "mixture, fsdp, shared experts": (MIXTURE, ParallelConfig(strategy="fsdp", expert_ranks=2)),
    "two encoders, ddp": (ENCODERS, ParallelConfig()),
    "two encoders, fsdp": (ENCODERS, ParallelConfig(strategy="fsdp")),
    "dense first, resampler, fsdp": (DENSE_FIRST, ParallelConfig(strategy="fsdp", expert_ranks=2)),
}
LAYOUTS_OF_FOUR = {
    "fsdp in pairs": (TINY, ParallelConfig(strategy="fsdp", shard_ranks=2)),
    "mixture, ddp, experts shared by pairs": (MIXTURE, ParallelConfig(expert_ranks=2)),
    "mixture, all in pairs": (MIXTURE, ParallelConfig(strategy="fsdp", shard_ranks=2, expert_ranks=2)),
}
OPTIM = OptimConfig(
    lr=0.01,
    warmup_steps=0,
    rules=(ParamRule("norm|embed|bias|head|down_proj|layer_scale"), ParamRule("", optimizer="muon", weight_decay=0.1)),
)


# As the ranks have: with another number of threads the same product may be added up in another order.
pytestmark = pytest.mark.usefixtures("one_thread")


def make_batches(processor):
    """Four micro-batches of very different numbers of trained tokens, the third without an image."""
    answers = ["red", "a red circle at the top left, a blue star at the bottom and the number 42.", "no", "left"]
    return [
        make_batch([make_document(processor, i, ("what?", answer), images=i != 2)]) for i, answer in enumerate(answers)
    ]


def take_step(config, layout, batches):
    """Let one step run over this rank's batches; return its losses and the whole gradients."""
    torch.manual_seed(0)
    model = VLM(config)
    replica = parallel.parallelize(model, layout, torch.device("cpu"), "fp32")
    state = train.TrainState(model, replica, {}, [], threads=1, precision="fp32")
    num_trained = int(distributed.add_up({"n": sum(len(batch.trained) for batch in batches)})["n"])
    metrics = train.train_step(state, batches, num_trained, TrainConfig(optim=OPTIM))
    losses = {name: x for name, x in metrics.items() if name in ("loss", "router_loss")}
    return {name: whole(p.grad) for name, p in model.named_parameters()} | losses


def take_the_same_step_twice(config, batches):
    """Return the gradients of one batch in the first and in the second step of DDP."""
    model, gradients = VLM(config), []
    replica = parallel.parallelize(model, ParallelConfig(), torch.device("cpu"), "fp32")
    for _ in range(2):
        NextToken().loss(replica, batches[0]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        replica.zero_grad()
    return gradients


def take_bad_step(config, layout, batches):
    """Let a step go well, then one in which the last rank meets a NaN; return what that changed."""
    torch.manual_seed(0)
    model = VLM(config)
    replica = parallel.parallelize(model, layout, torch.device("cpu"), "fp32")
    state = train.TrainState(model, replica, make_optimizers(model, OPTIM), [], threads=1, precision="fp32")

    def step():
        is_bad = train.train_step(state, batches, 9, TrainConfig(model=config, optim=OPTIM))["is_bad"]
        tensors = checkpoint.name_tensors(model, state.optimizers)
        return bool(is_bad), {name: whole(x).clone() for name, x in tensors.items()}

    was_bad, before = step()
    assert not was_bad
    if distributed.rank() == 1:
        batches[0].pixel_values = torch.full(batches[0].pixel_values.shape, float("nan"))
    is_bad, after = step()
    assert is_bad
    return [name for name, x in before.items() if not torch.equal(x, after[name])]


def take_text_step(config, layout, batches, processor):
    """Let a step with images go, then one without; return what of the encoder and the projector the second moved."""
    torch.manual_seed(0)
    model = VLM(config)
    replica = parallel.parallelize(model, layout, torch.device("cpu"), "fp32")
    state = train.TrainState(model, replica, make_optimizers(model, OPTIM), [], threads=1, precision="fp32")
    train.train_step(state, batches, 9, TrainConfig(model=config, optim=OPTIM))
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    text = make_batch([make_document(processor, distributed.rank(), ("what?", "that"), images=0)])
    train.train_step(state, [text], 9, TrainConfig(model=config, optim=OPTIM))
    moved = [name for name, p in model.named_parameters() if not torch.equal(whole(p), before[name])]
    assert any(name.startswith("decoder.") for name in moved)
    return [name for name in moved if not name.startswith("decoder.")]


def dtypes_in_a_block(layout, batch):
    """Return the dtypes of a block's matrices and of the cosines and sines that reach it in a bf16 run."""
    model, seen = VLM(TINY), []
    parallel.parallelize(model, layout, torch.device("cpu"), "bf16")
    attention = model.decoder.layers[1].self_attn
    attention.register_forward_pre_hook(lambda _module, args: seen.extend([attention.q_proj.weight, *args[1]]))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    return [x.dtype for x in seen]


def update_weights(config, layout):
    """Let each AdamW and Muon take two steps along gradients drawn for each parameter; return the whole weights."""
    return {
        f"{moments} {name}": x for moments in ("fp32", "bf16") for name, x in _update(config, layout, moments).items()
    }


def _update(config, layout, moments):
    torch.manual_seed(0)
    model = VLM(config)
    parallel.parallelize(model, layout, torch.device("cpu"), "fp32")
    optimizers = make_optimizers(model, dataclasses.replace(OPTIM, moments=moments))
    for step in range(2):
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
            grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        for optimizer in optimizers.values():
            optimizer.step()
    return {name: whole(p) for name, p in model.named_parameters()}


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().contiguous()


# --- one start of two ranks for all layouts --------------------------------------------------------------------

WORKER = """
import dataclasses, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from nanovlm import cli, distributed
from nanovlm.train import checkpoint, parallel
from nanovlm.data.chat import Processor
from nanovlm.model.vlm import VLM
from nanovlm.objectives import OBJECTIVES
from tests.conftest import TINY
from tests.test_distributed import (
    LAYOUTS, LAYOUTS_OF_FOUR, MIXTURE, dtypes_in_a_block, make_batches, take_bad_step, take_step,
    take_text_step, take_the_same_step_twice, update_weights
)
folder = Path(sys.argv[1])
torch.set_num_threads(1)
with distributed.ranks(torch.device("cpu")):
    mine = make_batches(Processor.load(folder, TINY))[distributed.rank()::distributed.num_ranks()]
    for name, (config, layout) in (LAYOUTS if distributed.num_ranks() == 2 else LAYOUTS_OF_FOUR).items():
        gradients, weights = take_step(config, layout, mine), update_weights(config, layout)
        if distributed.rank() == 0:
            save_file(gradients, folder / f"{name}, gradients.safetensors")
            save_file(weights, folder / f"{name}, weights.safetensors")
    if distributed.num_ranks() == 4:
        config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=False))
        first, second = take_the_same_step_twice(config, mine)
        for name, x in first.items():
            assert torch.equal(x, second[name]), name
    else:
        assert dtypes_in_a_block(LAYOUTS["fsdp"][1], mine[0]) == [torch.bfloat16, torch.float32, torch.float32]
        torch.manual_seed(0)
        model = VLM(TINY)
        parallel.parallelize(model, LAYOUTS["fsdp"][1], torch.device("cpu"), "fp32")
        checkpoint.Saving(folder, model, {}, {"step": 1}, checkpoint.rng_state(), keep=1).finish()
        distributed.wait()
        whole = parallel.whole_tensors(model)
        assert bool(whole) == (distributed.rank() == 0)
        again = VLM(TINY)
        parallel.parallelize(again, LAYOUTS["fsdp"][1], torch.device("cpu"), "fp32")
        checkpoint.load_checkpoint(checkpoint.list_checkpoints(folder)[-1], again, {})
        for name, x in parallel.whole_tensors(again).items():
            assert torch.equal(x, whole[name]), name
        moe = dataclasses.replace(MIXTURE.decoder.moe, balance="bias", bias_rate=0.1)
        biased = dataclasses.replace(MIXTURE, decoder=dataclasses.replace(MIXTURE.decoder, moe=moe))
        for config in (TINY, biased):
            for layout in (layout for _, layout in LAYOUTS.values() if config is biased or layout.expert_ranks == 1):
                mine = make_batches(Processor.load(folder, TINY))[distributed.rank()::2]
                changed = take_bad_step(config, layout, mine)
                assert not changed, (layout, changed)
        for config, layout in LAYOUTS.values():
            mine = make_batches(Processor.load(folder, TINY))[distributed.rank()::2]
            moved = take_text_step(config, layout, mine, Processor.load(folder, TINY))
            assert not moved, (layout, moved)
cli.end(0)
"""


def torchrun(script, *args, ranks=2, restarts=0, **options):
    """Start ranks of a script; return its process."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, str(script), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory, processor):
    """The folder to which the ranks wrote what they computed."""
    folder = tmp_path_factory.mktemp("ranks")
    processor.save(folder)
    (folder / "worker.py").write_text(WORKER)
    for ranks in (2, 4):
        process = torchrun(folder / "worker.py", folder, ranks=ranks)
        _out, error = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, error
    return folder


def assert_close(theirs, ours, relative):
    """Compare tensor by tensor; the gradient of a key's bias is exactly zero, and what is computed rounding alone."""
    rounding = 1e-8 * sum(x.square().sum() for x in ours.values()).sqrt()
    for key, x in ours.items():
        assert (theirs[key] - x).norm() <= relative * x.norm() + rounding, key


@pytest.mark.parametrize("name", LAYOUTS | LAYOUTS_OF_FOUR)
def test_ranks_have_the_gradients_of_one(results, processor, name):
    """Two micro-batches on each of two ranks, or one on each of four, against all four on one."""
    theirs = load_file(results / f"{name}, gradients.safetensors")
    ours = take_step((LAYOUTS | LAYOUTS_OF_FOUR)[name][0], ParallelConfig(), make_batches(processor))
    assert theirs.keys() == ours.keys()
    assert_close(theirs, ours, 1e-6)


@pytest.mark.parametrize("name", LAYOUTS | LAYOUTS_OF_FOUR)
def test_ranks_take_the_optimizer_steps_of_one(results, name):
    theirs = load_file(results / f"{name}, weights.safetensors")
    ours = update_weights((LAYOUTS | LAYOUTS_OF_FOUR)[name][0], ParallelConfig())
    assert theirs.keys() == ours.keys()
    assert_close(theirs, ours, 1e-6)


def test_micro_batches_are_one_large_batch(processor):
    answers = ["red", "a red circle at the top left, a blue star at the bottom and the number 42.", "no", "left"]
    documents = [make_document(processor, i, ("what?", answer)) for i, answer in enumerate(answers)]
    four = take_step(TINY, ParallelConfig(), [make_batch([document]) for document in documents])
    one = take_step(TINY, ParallelConfig(), [make_batch(documents, rows=4)])
    # Gradients are sums over all tokens, which four products and one add up in another order.
    assert_close(four, one, sum(map(len, documents)) * torch.finfo(torch.float32).eps)


def test_what_two_ranks_saved_one_reads(results):
    torch.manual_seed(0)
    model = VLM(TINY)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state, _rng = checkpoint.load_checkpoint(checkpoint.list_checkpoints(results)[-1], model, {})
    assert state == {"step": 1}
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (TINY, ParallelConfig(expert_ranks=2), "ranks = 1 cannot form groups of parallel.expert_ranks = 2"),
        (
            TINY,
            ParallelConfig(strategy="fsdp", shard_ranks=3),
            "ranks = 1 cannot form groups of parallel.shard_ranks = 3",
        ),
    ],
)
def test_ranks_that_cannot_be_divided_are_named(config, layout, message):
    with pytest.raises(ValueError, match=message):
        parallel.parallelize(VLM(config), layout, torch.device("cpu"), "fp32")


# --- whole runs --------------------------------------------------------------------------------------------------

RUN = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from nanovlm import cli, distributed
from nanovlm.config import ParallelConfig
from nanovlm.config import EvalConfig
from tests.test_distributed import PARALLEL_RUN
rank, first_start = int(os.environ.get("RANK", 0)), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
step = train.train_step
def train_step(state, *args):
    {hook}
    return step(state, *args)
train.train_step = train_step
cli.run(lambda: train.main(dataclasses.replace(PARALLEL_RUN, run_dir={run_dir!r}, **{changes})))
cli.end(0)
"""
PARALLEL_RUN = dataclasses.replace(
    SMALL,
    precision="fp32",
    eval=EvalConfig(),
    checkpoint_every=2,
    optim=dataclasses.replace(SMALL.optim, steps=8, micro_batches=2),
    parallel=ParallelConfig(strategy="fsdp"),
)


WORKERS = '{"data": dataclasses.replace(PARALLEL_RUN.data, num_workers=1)}'


def start(tmp_path, run_dir, hook="pass", changes="{}", restarts=0, **options):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(ROOT), hook=hook, run_dir=str(run_dir), changes=changes))
    return torchrun(script, restarts=restarts, **options)


def finish(process, expected=0):
    out, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == expected, error[-4000:]
    return out, error


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(folder, folder / "run"))
    return metrics(folder / "run")


def test_a_rank_that_is_killed_is_started_again_and_goes_on_bit_for_bit(tmp_path, unbroken):
    step, rank = random.randint(0, 7), random.randint(0, 1)
    print(f"rank {rank} at step {step}")
    hook = f"if first_start and rank == {rank} and state.step == {step}: os.kill(os.getpid(), signal.SIGKILL)"
    finish(start(tmp_path, tmp_path / "run", hook, restarts=1))
    assert comparable(metrics(tmp_path / "run")) == comparable(unbroken)
    nanovlm.load(tmp_path / "run" / "model")


def test_a_job_of_which_everything_is_killed_goes_on_bit_for_bit(tmp_path, unbroken):
    process = start(tmp_path, tmp_path / "run", changes=WORKERS)
    lines, wanted = tmp_path / "run" / "metrics.jsonl", random.randint(1, 6)
    while not lines.exists() or lines.read_text().count("\n") < wanted:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(ranks) == 2 and not (tmp_path / "run" / "eval.json").exists()
    finish(start(tmp_path, tmp_path / "run", changes=WORKERS))
    assert comparable(metrics(tmp_path / "run")) == comparable(unbroken)


def test_a_signal_saves_and_other_numbers_of_ranks_go_on(tmp_path, unbroken):
    """Two ranks until a scheduler's signal to one of them, one rank until a second signal, then two again."""
    rare = '{"checkpoint_every": 100}'
    hook = "if rank == {rank} and state.step == {step}: os.kill(os.getpid(), signal.{name})"
    _out, error = finish(
        start(tmp_path, tmp_path / "run", hook.format(rank=1, step=2, name="SIGTERM"), rare), expected=1
    )
    assert f"exitcode  : {train.RESTART}" in error
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")][-1] == "step_00000004"
    hook = hook.format(rank=0, step=4, name="SIGUSR1")
    script = RUN.format(root=str(ROOT), hook=hook, run_dir=str(tmp_path / "run"), changes=rare)
    alone = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == train.RESTART, alone.stderr
    assert "stopped by a signal at step 6" in alone.stdout
    finish(start(tmp_path, tmp_path / "run", changes=rare))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[:4] == [line["loss"] for line in unbroken[:4]]
    assert losses == pytest.approx([line["loss"] for line in unbroken], rel=1e-4)
    assert [line["trained_tokens"] for line in metrics(tmp_path / "run")] == [x["trained_tokens"] for x in unbroken]


def test_a_signal_to_all_processes_saves_too(tmp_path):
    """As Slurm sends it: to ranks, the workers of their loaders and torchrun, which sends it to all of them again."""
    changes = """{"precision": "bf16", "eval": EvalConfig(("scenes",), limit=4, show_every=1), "checkpoint_every": 100,
        "data": dataclasses.replace(PARALLEL_RUN.data, num_workers=1)}"""
    hook = "if state.step == 2: [os.kill(pid, signal.SIGTERM) for pid in (os.getpid(), os.getppid())]"
    _out, error = finish(start(tmp_path, tmp_path / "run", hook, changes), expected=1)
    assert "death signal" in error and "forcefully" not in error
    step = len(metrics(tmp_path / "run"))
    assert 3 <= step < 8
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == f"step_{step:08d}", error
    out, error = finish(start(tmp_path, tmp_path / "run", changes=changes))
    assert f"at step {step}" in out and "step 8:" in out + error
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


def test_data_that_end_earlier_on_one_rank_end_the_run_on_all(tmp_path):
    record = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me, " * 60}]}
    (tmp_path / "own.jsonl").write_text("\n".join([json.dumps(record)] * 9))
    changes = f"""{{"data": dataclasses.replace(
        PARALLEL_RUN.data, sources=({str(tmp_path / "own.jsonl")!r},), lessons=(),
        batch_rows=1, num_epochs=1, row_length=400
    )}}"""
    finish(start(tmp_path, tmp_path / "run", changes=textwrap.dedent(changes)))
    lines = metrics(tmp_path / "run")
    assert 1 <= len(lines) < 8
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == f"step_{len(lines):08d}"
    assert (tmp_path / "run" / "eval.json").exists() and (tmp_path / "run" / "model").is_dir()


def test_two_ranks_judge_the_held_out_records_as_one_and_keep_the_best_model(tmp_path):
    records = [{"texts": [{"user": f"what is {i}?", "assistant": "no" if i % 4 else "yes"}]} for i in range(60)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    changes = f"""{{
        "data": dataclasses.replace(
            PARALLEL_RUN.data, sources=({str(tmp_path / "own.jsonl")!r},), lessons=(), val_fraction=0.3
        ),
        "eval": EvalConfig(every=2, val_batches=64, controls=False, patience=3),
        "optim": dataclasses.replace(PARALLEL_RUN.optim, lr=1e-2),
    }}"""
    for ranks in (1, 2):
        finish(start(tmp_path, tmp_path / f"run{ranks}", changes=textwrap.dedent(changes), ranks=ranks))
    runs = [tmp_path / "run1", tmp_path / "run2"]
    looks = [[line for line in metrics(folder) if "val_loss" in line] for folder in runs]
    assert [[line["step"] for line in lines] for lines in looks] == [[2, 4, 6, 8]] * 2
    for one, two in zip(*looks, strict=True):
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
        assert two["accuracy_held_out"] == pytest.approx(one["accuracy_held_out"])
    ends = [json.loads((folder / "eval.json").read_text())["best"] for folder in runs]
    assert ends[0]["step"] == ends[1]["step"] and ends[1]["value"] == min(line["val_loss"] for line in looks[1])
    one, two = (load_file(folder / "model-best" / "model.safetensors") for folder in runs)
    assert_close(two, one, 1e-3)


def test_an_error_on_one_rank_ends_the_job_with_that_error(tmp_path):
    hook = 'if rank == 1 and state.step == 2: raise ValueError("the sample 17 is broken")'
    _out, error = finish(start(tmp_path, tmp_path / "run", hook), expected=1)
    assert "the sample 17 is broken" in error and "rank      : 1" in error


@pytest.mark.parametrize(("limit", "moe"), [(1, None), (0, None), (1, dataclasses.replace(MOE, balance="bias"))])
def test_a_step_that_is_not_finite_changes_nothing_and_too_many_stop_the_run(tmp_path, monkeypatch, limit, moe):
    """A document that poisons the gradients at step 3: the weights stay, the step is counted, the document named."""
    step, weights = train.train_step, {}

    def train_step(state, batches, *args):
        if state.step == 2:
            batches[0].pixel_values = torch.full(batches[0].pixel_values.shape, float("nan"))
        before = {name: x.clone() for name, x in state.model.state_dict().items()}
        moments = [{k: v.clone() for k, v in s.items()} for o in state.optimizers.values() for s in o.state.values()]
        result = step(state, batches, *args)
        weights[state.step] = all(torch.equal(x, before[name]) for name, x in state.model.state_dict().items())
        if state.step == 3:
            after = [s for o in state.optimizers.values() for s in o.state.values()]
            assert all(torch.equal(v, b[k]) for s, b in zip(after, moments, strict=True) for k, v in s.items())
        return result

    monkeypatch.setattr(train, "train_step", train_step)
    optim = dataclasses.replace(SMALL.optim, steps=5, max_skipped_steps=limit)
    decoder = dataclasses.replace(SMALL.model.decoder, moe=moe)
    model = dataclasses.replace(SMALL.model, decoder=decoder)
    config = dataclasses.replace(SMALL, run_dir=str(tmp_path / "run"), model=model, optim=optim)
    if limit:
        train.main(config)
        lines = metrics(tmp_path / "run")
        assert [line["loss"] is None for line in lines] == [False, False, True, False, False]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
        assert weights == {1: False, 2: False, 3: True, 4: False, 5: False}
    else:
        message = (
            r"step 3: the loss or a gradient is not finite, .* = 0 allows; the step's documents: scenes:\S+, sample \d"
        )
        with pytest.raises(ValueError, match=message):
            train.main(config)


@pytest.mark.parametrize(("added_to_loss", "gradient_factor"), [(float("inf"), 1.0), (0.0, float("nan"))])
def test_a_loss_or_a_gradient_alone_makes_a_step_bad(processor, added_to_loss, gradient_factor):
    class Spoilt(NextToken):
        def loss(self, *args):
            return super().loss(*args) + added_to_loss

    model = VLM(TINY)
    model.decoder.norm.weight.register_hook(lambda grad: gradient_factor * grad)
    replica = parallel.parallelize(model, ParallelConfig(), torch.device("cpu"), "fp32")
    state = train.TrainState(model, replica, {}, [], threads=1, precision="fp32", objective=Spoilt())
    result = train.train_step(state, make_batches(processor)[:1], 9, TrainConfig(model=TINY, optim=OPTIM))
    assert result["is_bad"] and result["loss"].isfinite() == (added_to_loss == 0)
    assert result["grad_norm"].isfinite() == (gradient_factor == 1)
