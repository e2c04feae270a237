"""A merged folder, a base beside its adapter, and an adapter by itself answer alike, in all commands that take one."""

import dataclasses
import json
import sys

import pytest
import torch
from PIL import Image

import generate
import nanovlm
from nanovlm.command_line import GenerateConfig
from nanovlm.config import AdapterConfig, QuantizationConfig, SamplingConfig
from nanovlm.errors import UserError
from nanovlm.hub import export, merge
from nanovlm.hub.adapters import attach, attach_all, save_adapter
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.adapters import settle
from nanovlm.model.adapters import adapted_layers
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import quantize as quantize_model
from nanovlm.quant.__main__ import QuantizeConfig
from nanovlm.quant.__main__ import main as quantize_folder
from tests.conftest import noise
from tests.hub.test_adapters import learned, logits_of
from tests.hub.test_export import OWN, write_own

DRAWN = SamplingConfig(max_new_tokens=12, temperature=1.0)  # a random model says one thing again and again
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter of it with an encoder's layer and the projector, and one of the decoder alone."""
    folder = tmp_path_factory.mktemp("merge")
    write_own(folder / "model", OWN)
    dora = AdapterConfig(rank=4, use_dora=True)
    whole = dataclasses.replace(dora, target=r"decoder.*_proj$|vision.*fc1$", train=(r"^projector\.",))
    for name, config in (("adapter", dora), ("whole", whole)):
        model = learned(nanovlm.load(folder / "model")[0], config)
        model.adapters.base = str(folder / "model")
        save_adapter(folder / name, model)
    noise(0).save(folder / "a.png")
    return folder


def run(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    module.main()


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_merged_beside_and_alone(folder, tmp_path, monkeypatch, capsys, name):
    run(monkeypatch, merge, folder / "model", folder / name, tmp_path / "merged")
    merged, processor = nanovlm.load(tmp_path / "merged")
    assert (
        not adapted_layers(merged)
        and merged.state_dict().keys() == nanovlm.load(folder / "model")[0].state_dict().keys()
    )
    alone, _ = nanovlm.load(folder / name)
    assert "is an adapter for" in capsys.readouterr().err
    expected = logits_of(attach(nanovlm.load(folder / "model")[0], folder / name), processor)
    assert torch.equal(logits_of(alone, processor), expected)
    assert (logits_of(merged, processor) - expected).norm() <= 1e-5 * expected.norm()
    export.export(folder / name, tmp_path / "hub")
    assert torch.equal(logits_of(nanovlm.load(tmp_path / "hub")[0], processor), logits_of(merged, processor))
    with pytest.raises(UserError, match="is not an empty folder"):
        run(monkeypatch, merge, folder / "model", folder / name, tmp_path / "merged")


def test_another_base_is_noted(folder, capsys):
    attach(nanovlm.load(folder / "model")[0], folder / "adapter", base=str(folder / "model"))
    assert capsys.readouterr().err == ""
    attach(nanovlm.load(folder / "model")[0], folder / "adapter", base="smolvlm-256m")
    assert f"was made for {folder / 'model'}, and is used with smolvlm-256m" in capsys.readouterr().err


def said(capsys, folder, **options):
    generate.main(GenerateConfig(image=(folder / "a.png",), prompt=("what?",), json=True, sampling=DRAWN, **options))
    return json.loads(capsys.readouterr().out)["text"]


def test_generate(folder, tmp_path, monkeypatch, capsys):
    """Beside a base that is quantised the adapter stays as it is."""
    run(monkeypatch, merge, folder / "model", folder / "adapter", tmp_path / "merged")
    capsys.readouterr()
    model, adapter = str(folder / "model"), str(folder / "adapter")
    expected = said(capsys, folder, model=str(tmp_path / "merged"))
    assert expected != said(capsys, folder, model=model)
    assert said(capsys, folder, model=model, adapter=adapter) == said(capsys, folder, model=adapter) == expected
    quantised, processor = nanovlm.load(model)
    quantize_model(quantised, QuantizationConfig("int4"))
    plain = copy_answer(quantised, processor, folder)
    answer = copy_answer(attach(quantised, adapter), processor, folder)
    assert said(capsys, folder, model=model, adapter=adapter, quantize="int4") == answer != plain
    whole = str(folder / "whole")
    changed = said(capsys, folder, model=model, adapter=whole, quantize="int4")
    assert changed == copy_answer(attach(reload(model), whole), processor, folder) != answer


def reload(model):
    return quantize_model(nanovlm.load(model)[0], QuantizationConfig("int4"))


def copy_answer(model, processor, folder):
    """The answer of a model that is prepared as generate.py does, by passes with its active adapters."""
    prompt = processor.batch([processor.prompt([{"role": "user", "content": "what?"}], [Image.open(folder / "a.png")])])
    return processor.decode(nanovlm.generate(prepare(model), prompt, DRAWN)[0])


def test_mistakes_are_named(folder, tmp_path, monkeypatch):
    model, adapter = folder / "model", folder / "adapter"
    with pytest.raises(UserError, match=r"the model has adapters, .*: merge them, or quantise before"):
        quantize_folder(QuantizeConfig(str(adapter), tmp_path / "out"))
    quantize_folder(QuantizeConfig(str(model), tmp_path / "int8", QuantizationConfig("int8")))
    with pytest.raises(UserError, match="is quantised: merged, it would be rounded again"):
        run(monkeypatch, merge, tmp_path / "int8", adapter, tmp_path / "out")
    data = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "copy").mkdir()
    for base, match in (
        (None, "does not say which model it is for: name its model"),
        (str(tmp_path / "gone"), r"is an adapter for .*gone, which cannot be read \(.*\): name its model"),
        (str(adapter), r"which cannot be read \(.* is no model but an adapter"),
    ):
        (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps(data | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=match):
            nanovlm.load(tmp_path / "copy")
    loaded = nanovlm.load(model)[0]
    for given, match in (
        (str(adapter), r"an adapter is given as name=FOLDER, not"),
        (f"a b={adapter}", "an adapter cannot be called 'a b'"),
        (f"x={folder / 'whole'}", r"brings a projector\..* of its own, so no request can choose it: merge it"),
    ):
        with pytest.raises(UserError, match=match):
            attach_all(loaded, [given])
    attach_all(loaded, [f"x={adapter}"])
    with pytest.raises(UserError, match="adapted already, by one called x"):
        attach_all(loaded, [f"x={adapter}"])
    assert loaded.adapters.active == () and settle(nanovlm.load(model)[0]) is None


def test_weights_of_a_prepared_model_are_saved_merged(folder, tmp_path):
    """`merge` in bf16 rounds once, from sums in fp32."""
    model, processor = nanovlm.load(folder / "model", dtype=torch.bfloat16)
    attach(model, folder / "adapter")
    save_model(tmp_path / "bf16", merge.merge(model), processor)
    again = nanovlm.load(tmp_path / "bf16")[0].state_dict()
    exact = merge.merge(attach(nanovlm.load(folder / "model")[0], folder / "adapter")).state_dict()
    for key, x in exact.items():
        assert again[key].dtype == torch.bfloat16 and (again[key].float() - x).norm() <= 0.006 * x.norm()
