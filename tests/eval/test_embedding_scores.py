"""What embeddings are good for, against the definitions written out in numpy and fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanovlm.eval import embedding_scores
from nanovlm.eval.embedding_scores import (
    choose_l2,
    embed_classes,
    fit_linear,
    knn_scores,
    linear_scores,
    recalls,
    top_accuracies,
    zero_shot,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def make_classes(num, noise, seed):
    """Embeddings around three centres."""
    labels = torch.arange(num) % 3
    return F.normalize(make(3, 6)[labels] + noise * make(num, 6, seed=seed), dim=1), labels


@pytest.fixture(autouse=True, params=[7, 2**25])
def chunks(request, monkeypatch):
    """Similarities of one query or of all at once."""
    monkeypatch.setattr(embedding_scores, "MAX_SIMILARITIES", request.param)


def test_a_class_is_the_mean_of_its_texts():
    vectors = dict(zip(("a cat.", "the cat!", "a dog {}.", "the dog {}!"), make(4, 5), strict=True))
    found = embed_classes(
        lambda texts: torch.stack([vectors[text] for text in texts]), ["cat", "dog {}"], ["a {}.", "the {}!"]
    )
    means = np.stack(
        [(vectors["a cat."] + vectors["the cat!"]) / 2, (vectors["a dog {}."] + vectors["the dog {}!"]) / 2]
    )
    np.testing.assert_allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True))


def test_zero_shot_counts_the_largest_similarities():
    images, classes, labels = make(40, 8), make(9, 8, seed=1), torch.arange(40) % 9
    order = np.argsort(-(images.numpy() @ classes.numpy().T), axis=1)
    expected = {
        f"top_{k}": np.mean([label in row[:k] for label, row in zip(labels, order, strict=True)]) for k in (1, 5)
    }
    assert zero_shot(images, classes, labels) == pytest.approx(expected)
    assert 0 < expected["top_1"] < expected["top_5"] < 1


def test_there_is_no_top_5_of_three_classes():
    assert zero_shot(make(4, 3), make(3, 3), torch.zeros(4, dtype=torch.int64)).keys() == {"top_1"}


def test_ties_are_misses():
    same = torch.ones(20, 4) / 2
    labels = torch.arange(20)
    assert set(zero_shot(same, same, labels).values()) == {0}
    assert set(recalls(same, same, labels).values()) == {0}


def test_recalls_are_those_of_sorted_lists():
    """Several texts a picture, in no order, and a picture without any."""
    images, image_of_text = make(13, 4), torch.tensor([3, 0, 1, 2, 2, 3, 5, 5, 5, 4, 6, 7, 8, 9, 10, 11, 3, 0])
    texts = F.normalize(images[image_of_text] + 2 * make(18, 4, seed=1), dim=1)
    similarities = (images @ texts.T).numpy()
    expected = {}
    for k in (1, 5, 10):
        nearest = {i: np.argsort(-similarities[i])[:k] for i in image_of_text.unique().tolist()}
        expected[f"image_to_text_{k}"] = np.mean([i in image_of_text[found] for i, found in nearest.items()])
        nearest = [np.argsort(-similarities[:, t])[:k] for t in range(18)]
        expected[f"text_to_image_{k}"] = np.mean([image_of_text[t] in nearest[t] for t in range(18)])
    assert recalls(images, texts, image_of_text) == pytest.approx(expected)
    assert len(set(expected.values())) > 3


def test_near_neighbours_vote_by_their_similarity():
    train, labels = make_classes(30, 1.5, seed=1)
    test, own = make_classes(12, 1.5, seed=2)
    scores = knn_scores(train, labels, test, 4, k=5)
    for x, votes in zip(test.numpy(), scores.numpy(), strict=True):
        similarities = train.numpy() @ x
        nearest = np.argsort(-similarities)[:5]
        expected = [sum(np.exp(similarities[j] / 0.07) for j in nearest if labels[j] == c) for c in range(4)]
        np.testing.assert_allclose(votes, np.array(expected) / np.exp(similarities.max() / 0.07))
    assert 0.4 < top_accuracies(scores, own)["top_1"] < 1
    assert (knn_scores(train.float(), labels, test.float(), 4, temperature=1e-3)).isfinite().all()
    assert knn_scores(train[:3], labels[:3], test, 4).shape == (12, 4)  # fewer than k


@pytest.mark.parametrize("l2", [1e-4, 1e-1])
def test_the_linear_probe_is_at_its_minimum(l2):
    """Where the gradient of a strictly convex function is zero: (p - y)^T x / n + l2 W = 0, sum (p - y) = 0."""
    train, labels = make_classes(60, 2.0, seed=1)
    weight, bias = (t.numpy() for t in fit_linear(train.float(), labels, 3, l2))
    x = train.float().double().numpy()
    logits = x @ weight.T + bias
    difference = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[labels]
    np.testing.assert_allclose(difference.T @ x / len(x) + l2 * weight, 0, atol=1e-7)
    np.testing.assert_allclose(difference.mean(0), 0, atol=1e-7)
    test, own = make_classes(300, 2.0, seed=2)
    scores = linear_scores(train.float(), labels, test.float(), 3, l2)
    np.testing.assert_allclose(scores, test.float().double().numpy() @ weight.T + bias)
    assert top_accuracies(scores, own)["top_1"] > 0.5
    assert torch.equal(scores, linear_scores(train.float(), labels, test.float(), 3, l2))


def test_left_out_embeddings_choose_how_much_is_learned():
    """Labels that depend on small differences need small l2, labels that are noise large."""
    generator = torch.Generator().manual_seed(0)
    x = make(100, 6)
    labels = (x[:, 0] > 0).long()
    assert choose_l2(x * 0.01, labels, 2) <= 1e-5
    assert choose_l2(torch.randn(100, 40, generator=generator), torch.zeros(100, dtype=torch.int64), 2) == 1e-1
