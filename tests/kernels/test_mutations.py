"""The script that plants bugs in kernels: its table fits the kernels, and it knows caught from survived."""

import json

import pytest

from benchmarks import mutations
from benchmarks.mutations import MUTATIONS, ROOT, MutationConfig, plant


@pytest.mark.parametrize("kernel", MUTATIONS)
def test_every_bug_can_be_planted(kernel):
    """Once each, and into Python that is still Python."""
    text = (ROOT / "kernels" / f"{kernel}.py").read_text()
    planted = {plant(text, old, new) for _, old, new in MUTATIONS[kernel]}
    assert len(planted) == len(MUTATIONS[kernel]) >= 10
    for changed in planted:
        compile(changed, kernel, "exec")


def test_caught_and_survived(tmp_path, monkeypatch, capsys):
    """On a function of our own: one bug that its test sees, and one that it does not."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "nanovlm").mkdir()
    (tmp_path / "nanovlm" / "__init__.py").touch()
    (tmp_path / "nanovlm" / "kernels").symlink_to("../kernels")
    (tmp_path / "tests" / "kernels" / "oracle.py").touch()
    (tmp_path / "kernels" / "twice.py").write_text("def twice(x):\n    return 2 * x\n")
    test = tmp_path / "tests" / "kernels" / "test_twice.py"
    test.write_text("from nanovlm.kernels.twice import twice\n\n\ndef test_twice():\n    assert twice(2) == 4\n")
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "RESULTS", tmp_path / "mutations.json")
    monkeypatch.setattr(
        mutations,
        "copy_tree",
        lambda folder: mutations.shutil.copytree(tmp_path, folder, symlinks=True, dirs_exist_ok=True),
    )
    bugs = [("product", "2 * x", "3 * x"), ("power", "2 * x", "x ** 2")]
    monkeypatch.setattr(mutations, "MUTATIONS", {"twice": bugs})
    assert mutations.main(MutationConfig()) == 1
    results = json.loads((tmp_path / "mutations.json").read_text())
    assert (results["planted"], results["caught"]) == (2, 1)
    assert [(line["result"], line["by"]) for line in results["mutations"]] == [
        ("caught", "test_twice"),
        ("survived", ""),
    ]
    assert "survived: twice: power" in capsys.readouterr().out
    # Nothing is run again before a source changes.
    assert mutations.main(MutationConfig()) == 1 and "1/2" not in capsys.readouterr().out
    test.write_text(test.read_text() + "    assert twice(3) == 7\n")
    # Now it is, and the tests must pass before a bug is planted.
    with pytest.raises(ValueError, match=r"tests of kernels/twice.py fail before a bug is planted: test_twice"):
        mutations.main(MutationConfig())


def test_what_never_ends_hangs(tmp_path):
    (tmp_path / "test_forever.py").write_text("def test_forever():\n    while True:\n        pass\n")
    result, failed, seconds = mutations.run_tests(tmp_path, tmp_path / "test_forever.py", limit=2)
    assert (result, failed) == ("hangs", "") and 1 < seconds < 4
