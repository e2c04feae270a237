"""Losses of pairs: those of TRL on the same weights, and of answers written out; gradients; what they count and say."""

import collections
import dataclasses
import functools
import math
import types
from copy import deepcopy

import pytest
import torch
import transformers
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

import nanovlm
from nanovlm.config import (
    AdapterConfig,
    DataConfig,
    InitConfig,
    MoEConfig,
    PreferenceConfig,
    QuantizationConfig,
    TrainConfig,
)
from nanovlm.data.process import make_process
from nanovlm.data.types import Document
from nanovlm.errors import UserError
from nanovlm.hub import export
from nanovlm.hub.adapters import save_adapter
from nanovlm.hub.model_folder import save_model
from nanovlm.model.adapters import adapt
from nanovlm.model.quantized import quantize
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from nanovlm.objectives.preference import LOSSES, Pairs, Preference
from nanovlm.objectives.reference import fingerprint, make_reference
from nanovlm.train.adapt import take_adapter
from nanovlm.train.init import start
from nanovlm.train.state import TrainState
from nanovlm.train.step import train_step
from nanovlm.train.validate import validate
from tests.conftest import TINY, make_batch, noise
from tests.hub.test_export import OWN, TEXT_ONLY, randomize, write_own

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDS = [
    {"prompt": "what is it?", "chosen": "a red square", "rejected": "blue"},
    {"prompt": "and how many are there?", "chosen": "two", "rejected": "there are none of them"},
    {"prompt": "where?", "chosen": "at the top", "rejected": "at the left, below the circle"},
]


def documents_of(processor, sees=True, records=RECORDS):
    process = make_process(processor, DataConfig(), learns_from="pairs")
    return [process(raw | ({"image": noise(i, 40)} if sees else {})) for i, raw in enumerate(records)]


def write_out(document):
    """The answers of a pair as documents of their own, each with its own copy of the prompt and the pictures."""
    copies = []
    for number in (1, 2):
        mine = (document.branch_ids == 0) | (document.branch_ids == number)
        ids, labels = document.input_ids[mine], document.labels[mine]
        values = {name: x[mine] for name, x in document.values.items()}
        copies.append(Document(ids, labels, torch.zeros_like(ids).int(), document.tiles, values))
    return copies


def make_config(folder, **options):
    return TrainConfig(
        objective="preference", init=InitConfig(model=str(folder)), preference=PreferenceConfig(**options)
    )


def make_objective(folder, processor, **options):
    return Preference(make_config(folder, **options), processor, torch.device("cpu"))


# --- TRL ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pictures", "text"])
def models(request, tmp_path_factory):
    """The policy, its processor, its export, and the folder of a reference with other weights and its export."""
    folder = tmp_path_factory.mktemp("models")
    config = OWN if request.param == "pictures" else TEXT_ONLY
    write_own(folder / "reference", config)
    policy, processor = nanovlm.load(folder / "reference")
    randomize(policy)
    save_model(folder / "policy", policy, processor)
    for name in ("policy", "reference"):
        export.export(folder / name, folder / f"{name}_hub")
    auto = transformers.AutoModelForImageTextToText if config.vision else transformers.AutoModelForCausalLM
    theirs = [auto.from_pretrained(folder / f"{name}_hub").eval() for name in ("policy", "reference")]
    for model in theirs:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return policy, processor, folder / "reference", *theirs


def their_inputs(document):
    """A pair as TRL's collator has it: two rows, chosen and rejected, padded on the right."""
    copies = write_out(document)
    length = max(map(len, copies))
    ids, mask, trained = torch.zeros(3, 2, length, dtype=torch.int64).unbind(0)
    for row, copy in enumerate(copies):
        ids[row, : len(copy)], mask[row, : len(copy)] = copy.input_ids, 1
        trained[row, 1 : len(copy)] = (copy.labels[:-1] >= 0).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": trained}
    if len(document.tiles):
        inputs["pixel_values"] = normalize(document.tiles).repeat(2, 1, 1, 1, 1)
    return inputs


def their_loss(policy, reference, document, losses, beta):
    trainer = types.SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        label_smoothing=0.0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, policy, their_inputs(document), False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items() if name != "num_tokens"}


@pytest.mark.parametrize(
    ("ours", "theirs", "beta"),
    [
        (("dpo",), {"sigmoid": 1.0}, 0.3),
        (("ipo",), {"ipo": 1.0}, 0.3),
        (("mpo",), {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.1),
        (("sft=0.5",), {"sft": 0.5}, 0.1),
    ],
)
def test_losses_gradients_and_metrics_are_those_of_trl(models, ours, theirs, beta):
    """With bco's delta 0, as it is in the first step and always in TRL; the mean of their losses of each pair."""
    policy, processor, folder, their_policy, their_reference = models
    documents = documents_of(processor, policy.config.vision is not None)
    objective, extras = make_objective(folder, processor, losses=ours, beta=beta), Extras()
    batch = make_batch(documents, rows=2)
    policy.zero_grad()
    their_policy.zero_grad()
    loss = objective.loss(policy, batch, extras) / objective.count(batch)
    loss.backward()
    found = [their_loss(their_policy, their_reference, document, theirs, beta) for document in documents]
    expected = torch.stack([loss for loss, _metrics in found]).mean()
    expected.backward()
    assert objective.count(batch) == 3 and abs(loss - expected) < 1e-5 * max(1, abs(expected))
    gradient, their_gradient = policy.decoder.embed_tokens.weight.grad, their_policy.get_input_embeddings().weight.grad
    assert (gradient - their_gradient).abs().max() < 1e-5 * max(1, float(their_gradient.abs().max()))
    if ours == ("sft=0.5",):
        return
    metrics = {name: float(total) / number for name, (total, number) in extras.means.items()}
    for mine, name in (
        *(
            ("rewards_chosen", "rewards/chosen"),
            ("rewards_rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
        ),
        *(("preference_accuracy", "rewards/accuracies"), ("logps_chosen", "logps/chosen")),
    ):
        mean = sum(metrics[name] for _loss, metrics in found) / 3
        assert metrics[mine] == pytest.approx(mean, abs=1e-4), name
    assert metrics["kl"] > 0


@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_label_smoothing_are_those_of_trl(loss_type, smoothing):
    """TRL's CPO trainer has them: dpo with smoothing is its sigmoid of log-probabilities above the reference's."""
    torch.manual_seed(0)
    pairs = Pairs(-5 * torch.rand(4, 2), -5 * torch.rand(4, 2), torch.randint(1, 9, (4, 2)), torch.zeros(()))
    config = PreferenceConfig(beta=1.5, gamma=0.7, label_smoothing=smoothing)
    trainer = types.SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        beta=1.5,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    given = pairs.logprobs / pairs.lengths if loss_type == "simpo" else pairs.ratios
    expected = CPOTrainer.cpo_loss(trainer, *given.unbind(1))[0]
    found = LOSSES["simpo" if loss_type == "simpo" else "dpo"].of(pairs, config)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# --- formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    lengths, config = torch.tensor([[3, 5], [2, 2]]), PreferenceConfig(beta=0.7, label_smoothing=0.1)
    logprobs = (-9 * torch.rand(2, 2, dtype=torch.float64)).requires_grad_()
    references, shift = -9 * torch.rand(2, 2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def loss(logprobs):
        return LOSSES[name].of(Pairs(logprobs, references, lengths, shift), config)

    assert torch.autograd.gradcheck(loss, logprobs) and (loss(logprobs) != 0).all()


def test_bco_shifts_rewards_by_their_mean_so_far():
    """delta as in Jung et al. 2024: the mean of the rewards of all answers of the steps before."""
    objective = make_bco()
    objective.state["rewards"] += torch.tensor([3.0, 6.0], dtype=torch.float64)
    assert objective.shift(torch.zeros(())) == 0.5
    pairs = Pairs(torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.5))
    expected = -math.log(1 / (1 + math.exp(-(0.2 - 0.5)))) - math.log(1 / (1 + math.exp(-0.1 - 0.5)))
    assert float(LOSSES["bco"].of(pairs, objective.config)) == pytest.approx(expected)


def make_bco(**options):
    config = TrainConfig(objective="preference", preference=PreferenceConfig(("bco",), reference="records", **options))
    return Preference(config, None, torch.device("cpu"))


def test_rewards_of_all_micro_batches_make_the_next_delta(processor):
    torch.manual_seed(0)
    model, objective, extras = VLM(TINY).eval(), make_bco(beta=0.5), Extras()
    records = [raw | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -9.0} for raw in RECORDS]
    documents, rewards = documents_of(processor, records=records), []
    for part in (documents[:1], documents[1:]):
        batch = make_batch(part)
        objective.loss(model, batch, extras)
        sums = find_branches(batch).sum(batch_logprobs(model, batch))
        rewards.append(0.5 * (sums.detach() - torch.tensor([-3.0, -9.0] * len(part))))
    total, number = extras.sums["rewards"].tolist()
    assert number == 6 and total == pytest.approx(float(torch.cat(rewards).sum()), rel=1e-5)


def test_a_step_adds_its_rewards_unless_it_is_bad(processor):
    """Once, whatever the micro-batches, and validation adds nothing."""
    torch.manual_seed(0)
    model, objective = VLM(TINY), make_bco()
    records = [raw | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -9.0} for raw in RECORDS]
    batches = [make_batch([document]) for document in documents_of(processor, records=records)]
    state = TrainState(model, model, {}, [], threads=1, precision="fp32", objective=objective)
    metrics = train_step(state, batches, 3, TrainConfig(model=TINY))
    mean = float(metrics["rewards_chosen"] + metrics["rewards_rejected"]) / 2
    assert objective.state["rewards"].tolist() == pytest.approx([6 * mean, 6]) and mean < -1
    validate(state, {"pairs": [batches]})
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)
    assert train_step(state, batches, 3, TrainConfig(model=TINY))["is_bad"]
    assert objective.state["rewards"].tolist() == pytest.approx([6 * mean, 6])


# --- branches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [("dpo", "ipo"), ("mpo",), ("simpo",)])
def test_a_pair_equals_its_answers_written_out(model, processor, tmp_path, losses):
    """In the loss and every gradient, to rounding."""
    other = VLM(model.config)
    randomize(other)
    save_model(tmp_path / "reference", other, processor)
    objective = make_objective(tmp_path / "reference", processor, losses=losses, beta=0.5)
    documents, found = documents_of(processor), []
    for batch in (make_batch(documents, rows=2), make_batch([c for d in documents for c in write_out(d)])):
        model.zero_grad()
        loss = objective.loss(model, batch, Extras())
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert objective.count(batch) == 3
    (loss, gradients), (expected, expected_gradients) = found
    assert abs(loss - expected) < 2e-6 * abs(expected)
    for name, gradient in gradients.items():
        size = float(expected_gradients[name].abs().max())
        assert (gradient - expected_gradients[name]).abs().max() < 2e-5 * max(size, 1e-2), name
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0.1


@pytest.mark.parametrize("changed", [0, 1])
def test_a_changed_answer_leaves_the_other_bit_equal(model, processor, changed):
    documents = documents_of(processor)
    batch = make_batch(documents)
    before, index = batch_logprobs(model, batch), find_branches(batch).index
    is_changed = index % 2 == changed
    for document in documents:
        inside = (document.branch_ids == changed + 1).nonzero()[1:, 0]  # but its first token, which is the prompt's
        document.input_ids[inside] = 500 - document.input_ids[inside]
    after = batch_logprobs(model, make_batch(documents))
    assert torch.equal(before[~is_changed], after[~is_changed])
    assert (before[is_changed] != after[is_changed]).any()


# --- reference ----------------------------------------------------------------------------------------------------


def test_a_model_equals_its_own_reference_at_first(processor, tmp_path):
    torch.manual_seed(0)
    model = VLM(TINY)
    save_model(tmp_path / "start", model, processor)
    objective, extras = make_objective(tmp_path / "start", processor), Extras()
    model.train()
    loss = objective.loss(model, make_batch(documents_of(processor)), extras)
    assert float(loss) == pytest.approx(3 * math.log(2), abs=1e-7) and model.training
    assert float(extras.means["kl"][0]) == 0 and float(extras.means["margin"][0]) == 0
    assert not any(
        p.grad is not None or p.requires_grad for p in objective.reference.__closure__[0].cell_contents.parameters()
    )


def test_a_model_without_its_adapters_is_its_reference(processor, tmp_path):
    """With dropout in training too."""
    torch.manual_seed(0)
    start = VLM(TINY)
    save_model(tmp_path / "start", start, processor)
    config, batch = make_config(tmp_path / "start"), make_batch(documents_of(processor))
    expected = batch_logprobs(start, batch)
    options = AdapterConfig(rank=2, dropout=0.5)
    model = adapt(start, options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    make = functools.partial(make_reference, name="", processor=processor, device=torch.device("cpu"), state={})
    found = make(dataclasses.replace(config, adapter=options))(model, batch)
    assert torch.equal(found, expected) and not found.requires_grad and model.training
    assert not torch.allclose(batch_logprobs(model, batch), expected)


@pytest.mark.parametrize(
    ("first", "own", "limit"),
    [
        ({}, {"init": "pissa"}, 1e-5),
        ({}, {"train": ("^projector",)}, 0),
        ({}, {"train": ("^projector",), "base": "int4"}, 0),
        ({"init": "orthogonal"}, {}, 0),
        ({"use_dora": True, "train": ("^projector",)}, {"base": "nf4"}, 0),
    ],
)
def test_a_run_is_compared_with_what_it_starts_from(processor, tmp_path, first, own, limit):
    """Where adapters begin as those of another run, or the base is rounded or changed, too."""
    torch.manual_seed(0)
    model = VLM(TINY)
    save_model(tmp_path / "start", model, processor)
    init = InitConfig(model=str(tmp_path / "start"))
    if first:
        adapt(model, AdapterConfig(rank=2, **first)).adapters.base = init.model
        for name, parameter in model.named_parameters():
            if ".adapters." in name or name.startswith("projector"):
                torch.nn.init.normal_(parameter)
        save_adapter(tmp_path / "first", model)
        init = dataclasses.replace(init, adapter=str(tmp_path / "first"))
    adapter = AdapterConfig(rank=0 if first else 2, **own)
    config = dataclasses.replace(make_config(tmp_path / "start"), model=TINY, init=init, adapter=adapter)
    config = take_adapter(config.validate()).validate()
    begun, _ = start(config, ())
    batch = make_batch(documents_of(processor))
    found = make_reference(config, "", processor, torch.device("cpu"), state := {})(begun, batch)
    assert state.keys() == {"frozen.reference", *(["frozen.init.adapter"] if first else [])}
    with torch.no_grad():
        assert (found - batch_logprobs(begun.eval(), batch)).abs().max() <= limit


def test_first_values_that_are_drawn_and_change_something_are_no_reference(processor, tmp_path):
    config = dataclasses.replace(make_config(tmp_path), adapter=AdapterConfig(rank=2, init="orthogonal"))
    with pytest.raises(UserError, match="orthogonal draws at random: choose kaiming or gaussian, or name a reference"):
        make_reference(config, "", processor, torch.device("cpu"), {})


def test_log_probabilities_of_records_equal_those_of_the_model(processor, tmp_path):
    torch.manual_seed(0)
    model = VLM(TINY).eval()
    reference = randomize(VLM(TINY))
    save_model(tmp_path / "reference", reference, processor)
    plain = make_batch(documents_of(processor))
    sums = find_branches(plain).sum(batch_logprobs(reference, plain)).view(-1, 2).tolist()
    records = [
        raw | {"ref_chosen_logps": c, "ref_rejected_logps": r} for raw, (c, r) in zip(RECORDS, sums, strict=True)
    ]
    batch = make_batch(documents_of(processor, records=records))
    computed = make_objective(tmp_path / "reference", processor, losses=("mpo",))
    read = make_objective("", processor, losses=("mpo",), reference="records")
    losses = [objective.loss(model, batch, Extras()) for objective in (computed, read)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert read.count(batch) == 3
    with pytest.raises(UserError, match="a record brings no ref_chosen_logps and ref_rejected_logps"):
        read.count(plain)


def test_simpo_and_sft_need_no_reference(processor, monkeypatch):
    monkeypatch.setattr("nanovlm.objectives.preference.make_reference", lambda *args: pytest.fail("reads a reference"))
    objective = make_objective("", processor, losses=("simpo", "sft=0.1"))
    extras = Extras()
    loss = objective.loss(VLM(TINY), make_batch(documents_of(processor)), extras)
    assert loss.isfinite() and "kl" not in extras.means and not objective.state


def test_what_is_no_reference_is_told(processor, tmp_path):
    with pytest.raises(
        UserError, match=r"there is none: start from init.model, or name another in preference.reference"
    ):
        make_objective("", processor)
    config = dataclasses.replace(TINY, projector=dataclasses.replace(TINY.projector, scale_factor=1))
    other = type(processor)(processor.tokenizer, processor.chat_template, config)
    save_model(tmp_path / "other", VLM(config), other)
    with pytest.raises(UserError, match="has num_image_tokens = 16, and the model 4: they must be equal"):
        make_objective(tmp_path / "other", processor)
    write_own(tmp_path / "tokens")
    with pytest.raises(UserError, match="has another tokenizer than the model"):
        make_objective(tmp_path / "tokens", processor)


# --- batches and settings -----------------------------------------------------------------------------------------


def test_a_batch_of_padding_is_no_pair_and_adds_the_same_metrics(processor, tmp_path):
    save_model(tmp_path / "start", VLM(TINY), processor)
    objective, padded, full = make_objective(tmp_path / "start", processor, losses=("mpo",)), Extras(), Extras()
    batch = make_batch(documents_of(processor))
    model = VLM(TINY)
    objective.loss(model, batch, full)
    batch.labels.fill_(-100)
    nothing = type(batch)(**{**vars(batch), "trained": None})
    loss = objective.loss(model, nothing, padded)
    loss.backward()
    assert objective.count(nothing) == 0 and loss == 0 and list(padded.means) == list(full.means)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_load_of_experts_is_kept_even_here_too(processor):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, intermediate_size=32, balance="loss", balance_weight=0.5)
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))).train()
    objective, extras = make_objective("", processor, losses=("simpo",)), Extras()
    batch = make_batch(documents_of(processor))
    loss = objective.loss(model, batch, extras)
    expected = sum(float(extras.means[name][0]) for name in ("loss_simpo",)) + float(extras.router_loss)
    assert loss.item() == pytest.approx(expected) and float(extras.router_loss) > 3 * 0.5 * 0.5
    assert float(objective.loss(model.eval(), batch, Extras())) == pytest.approx(
        float(extras.means["loss_simpo"][0]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"losses": ()}, "preference.losses is empty"),
        ({"losses": ("dpo=x",)}, "'dpo=x', which must be name or name=weight"),
        ({"losses": ("dpo=-1",)}, "the weight -1.0 of dpo in preference.losses must be positive"),
        ({"losses": ("mpo", "dpo")}, "names dpo twice"),
        ({"beta": 0.0}, "preference.beta = 0.0 must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5 must be at least 0 and below 0.5"),
        ({"gamma": -1.0}, "gamma = -1.0 must be at least 0"),
    ],
)
def test_what_is_no_setting_is_told(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config("", **options).validate()


@torch.no_grad()
@pytest.mark.parametrize("format", ["int4", None])
def test_a_fingerprint_is_that_of_the_bits_of_the_weights(format):
    torch.manual_seed(0)
    model = quantize(VLM(TINY), QuantizationConfig(format)) if format else VLM(TINY)
    mark, other = fingerprint(model.state_dict()), deepcopy(model)
    assert torch.equal(fingerprint(other.state_dict()), mark) and mark.dtype == torch.int64
    x = other.state_dict()["decoder.layers.1.mlp.up_proj." + ("codes" if format else "weight")].view(torch.uint8)
    x[3, 5] ^= 1
    assert not torch.equal(fingerprint(other.state_dict()), mark)


def test_a_loss_that_is_unknown_is_told(processor):
    with pytest.raises(UserError, match=r"preference.losses = 'dop' is unknown; there are dpo, ipo, simpo, bco, sft"):
        make_objective("", processor, losses=("dop",))
