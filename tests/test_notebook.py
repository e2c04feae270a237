"""The notebook runs from its first cell to its last, with fewer pictures and steps."""

import json
from pathlib import Path

import train

NOTEBOOK = Path(__file__).parent.parent / "examples" / "your_own_images.ipynb"


def test_the_notebook_answers(tmp_path, monkeypatch, one_thread):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lengths = "PICTURES, STEPS = 1000, 120"
    assert lengths in sources[0]
    sources[0] = sources[0].replace(lengths, "PICTURES, STEPS = 40, 2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "choose_threads", lambda device: 1)
    names = {}
    for source in sources:
        exec(source, names)
    assert len(names["answers"]) == 5 and all(isinstance(answer, str) for answer in names["answers"])
    assert len((tmp_path / "runs" / "my_model" / "metrics.jsonl").read_text().splitlines()) == 2
