"""The stages of a recipe say the same of rows on an engine as of records in the funnel."""

import json

import pytest

from nanovlm.data.build.engines import choose, judge_columns
from tests.data.build.test_funnel import make, planted

assert planted  # a fixture


@pytest.fixture
def rows(planted):
    """Those records that are rows: their pictures as bytes, with all columns there."""
    folder, expected = planted
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    lines, expected = lines[:-1], expected[:-1]
    for line in lines:
        line["images"] = [{"bytes": (folder / name).read_bytes(), "path": name} for name in line["images"]]
    return lines, expected


def test_datasets(planted, rows, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    recipe = make(planted[0], tmp_path)
    dataset = datasets.Dataset.from_list(rows[0])
    found = dataset.map(judge_columns(recipe), batched=True, batch_size=9)
    assert found.column_names == ["images", "texts", "nanovlm"] and len(found) == len(rows[0])
    assert list(choose(recipe, found["nanovlm"])) == rows[1]


def test_pandas_as_spark_hands_it_over(planted, rows, tmp_path):
    pandas = pytest.importorskip("pandas", reason="comes with datasets")
    recipe = make(planted[0], tmp_path)
    parts = [pandas.DataFrame(rows[0][:20]), pandas.DataFrame(rows[0][20:])]
    found = pandas.concat(map(judge_columns(recipe), parts))
    assert list(choose(recipe, found["nanovlm"])) == rows[1]


def test_ray(planted, rows, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the package ray")
    ray_data = pytest.importorskip("ray.data", reason="needs Ray Data")
    recipe = make(planted[0], tmp_path)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        dataset = ray_data.from_items([{"number": i, **row} for i, row in enumerate(rows[0])])
        found = dataset.map_batches(judge_columns(recipe), batch_size=9).sort("number").take_all()
    finally:
        ray.shutdown()
    assert list(choose(recipe, (row["nanovlm"] for row in found))) == rows[1]
