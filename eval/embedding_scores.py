"""Embeddings of pictures, texts and classes -> accuracies and recalls: what a space of embeddings is good for.

All functions are pure and deterministic. Embeddings are float[n, D], normalised except for the linear probe, which
takes any; labels are int64[n], numbers of classes. A tie counts as a miss, so that embeddings that are all alike have
nothing right. Similarities are computed for a chunk of queries at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES = 2**25  # 128 MiB in fp32, at most so many at once
KS = (1, 5, 10)
L2 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


# --- zero-shot classification ------------------------------------------------------------------------------------


def embed_classes(embed_texts: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the embedding of each class, float[K, D]: the mean of its name in all templates, normalised again.

    A template, such as "a photo of a {}.", has {} where the name goes; `embed_texts` returns normalised embeddings
    (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
    """
    texts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(embed_texts(texts).unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def top_accuracies(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return, for each k, the share of rows of scores [n, K] whose label is among the k largest scores: top_1, top_5.

    Where there are no more than k classes, there is no top_k.
    """
    own = scores.gather(1, labels[:, None])
    num_before = (scores >= own).sum(1) - 1
    return {f"top_{k}": (num_before < k).double().mean().item() for k in ks if k == 1 or k < scores.shape[1]}


def zero_shot(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracies of taking the class with the most similar embedding; `classes` float[K, D]."""
    return top_accuracies(images @ classes.T, labels)


# --- retrieval ---------------------------------------------------------------------------------------------------


def recalls(images: Tensor, texts: Tensor, image_of_text: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return recall@k of both directions, as image_to_text_1 and text_to_image_1.

    `image_of_text` int64[number of texts] is the index of the picture that each text describes; a picture may have
    several texts or none. A picture is found if one of its texts is among the k most similar texts, a text if its
    picture is among the k most similar pictures (Karpathy & Fei-Fei 2015, arXiv 1412.2306).
    """
    num_texts = image_of_text.bincount(minlength=len(images))
    before = []  # of each picture with texts: the other pictures' texts that are before the best of its own
    for rows, similarities in similar(images, texts):
        own = image_of_text == torch.arange(len(images), device=images.device)[rows, None]
        best = similarities.where(own, -torch.inf).amax(1, keepdim=True)
        before.append(((similarities >= best) & ~own).sum(1)[num_texts[rows] > 0])
    found = {f"image_to_text_{k}": (torch.cat(before) < k).double().mean().item() for k in ks}
    before = [
        (similarities >= similarities.gather(1, image_of_text[rows, None])).sum(1) - 1
        for rows, similarities in similar(texts, images)
    ]
    return found | {f"text_to_image_{k}": (torch.cat(before) < k).double().mean().item() for k in ks}


# --- probes ------------------------------------------------------------------------------------------------------


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return the votes for each class, float[n, K], of the k training embeddings most similar to each test embedding.

    A vote weighs exp(similarity / temperature) (DINO, arXiv 2104.14294, after Wu et al. 2018, arXiv 1805.01978), here
    divided by that of the nearest, so that none is too large.
    """
    votes = []
    for _, similarities in similar(test, train):
        nearest, indices = similarities.topk(min(k, len(train)), dim=1)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        zeros = weights.new_zeros(len(weights), num_classes)
        votes.append(zeros.scatter_add(1, train_labels[indices], weights))
    return torch.cat(votes)


def linear_scores(train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, l2: float = 1e-4) -> Tensor:
    """Return the logits float64[n, K] of a logistic regression on the training embeddings."""
    weight, bias = fit_linear(train, train_labels, num_classes, l2)
    return test.double() @ weight.T + bias


def fit_linear(x: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Return the weights [K, D] and biases [K] of smallest mean cross-entropy + l2 / 2 |weights|^2, in float64.

    The minimum is found by L-BFGS; there is one alone, up to a number added to all biases. scikit-learn's C is
    1 / (l2 n).
    """
    x = x.double()
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()


def choose_l2(x: Tensor, labels: Tensor, num_classes: int, candidates: Sequence[float] = L2) -> float:
    """Return the candidate with which a regression on four fifths of the embeddings gets most of the rest right.

    Every fifth is left out. Of equally good ones the largest is taken.
    """
    is_out = torch.arange(len(x), device=x.device) % 5 == 4
    scores = {
        l2: top_accuracies(linear_scores(x[~is_out], labels[~is_out], x[is_out], num_classes, l2), labels[is_out])
        for l2 in sorted(candidates, reverse=True)
    }
    return max(scores, key=lambda l2: scores[l2]["top_1"])


def similar(queries: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of queries, as slices, and their similarities to all others [chunk, n]."""
    size = max(1, MAX_SIMILARITIES // len(others))
    for start in range(0, len(queries), size):
        yield slice(start, start + size), queries[start : start + size] @ others.T
