"""Zero-shot weights, accuracies and recalls against the original's and against the plain definition."""

import numpy as np
import paddle
import pytest

from paddlemix.errors import DataError
from paddlemix.evaluation import retrieval, retrieval_recalls, zero_shot_weights
from paddlemix.evaluation.retrieval import dual_softmax, feature_recalls
from paddlemix.evaluation.zero_shot import accuracy, read_names
from paddlemix.models.internvl.embedder import unit
from tests.conftest import assert_close
from tests.models.internvl.helpers import load


def test_weights_and_scores_equal_the_original():
    reference = load()
    classes, templates = reference.expected["classes"], reference.expected["templates"]
    weights = zero_shot_weights(reference.model, reference.tokenizer, classes, templates, batch_size=5)
    assert_close(weights, reference.arrays["zeroshot_weights"])
    with paddle.no_grad():
        pictures = unit(reference.model.encode_image(reference.arrays["pixels_classification"]).numpy())
    assert_close(100 * pictures @ weights, reference.arrays["zeroshot_logits"])


def test_recalls_equal_the_original():
    expected = load().expected
    similarity, owner = load().arrays["retrieval_similarity"], expected["retrieval_picture_of_text"]
    for form in (np.asarray, lambda values: np.asarray(values).tolist()):
        found = retrieval_recalls(form(similarity), form(owner))
        assert found == pytest.approx(expected["retrieval"], abs=1e-6)


def by_sorting(similarity, owner, ks):
    """The definition, from sorted lists."""
    found = {}
    for k in ks:
        best = np.argsort(-similarity, axis=0, kind="stable")[:k]
        found[f"image_retrieval_recall@{k}"] = np.mean([owner[t] in best[:, t] for t in range(len(owner))])
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        found[f"text_retrieval_recall@{k}"] = np.mean([p in owner[best[p]] for p in range(len(similarity))])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_recalls_in_blocks_with_ties_and_pictures_without_texts(monkeypatch, seed):
    generator = np.random.default_rng(seed)
    images = unit(generator.integers(-1, 2, [23, 3]) + 0.01)
    texts = unit(generator.integers(-1, 2, [40, 3]) + 0.01)
    owner = generator.integers(0, 23, 40)
    monkeypatch.setattr(retrieval, "_BLOCK", 5 * 40)
    expected = by_sorting(images @ texts.T, owner, (1, 2, 5, 10))
    assert feature_recalls(images, texts, owner, (1, 2, 5, 10)) == pytest.approx(expected)
    assert retrieval_recalls(images @ texts.T, owner, (1, 2, 5, 10)) == pytest.approx(expected)


def test_a_model_that_tells_nothing_apart_finds_nothing():
    """Of equal scores the first ranks first, so that constant features do not look perfect."""
    found = retrieval_recalls(np.ones([50, 50]), np.arange(50))
    assert found["image_retrieval_recall@1"] == found["text_retrieval_recall@1"] == 0.02


@pytest.mark.parametrize(
    "similarity, owner, told",
    [
        (np.zeros([3, 4]), [0, 1, 2], "for each of the 4 texts"),
        (np.zeros([3, 4]), [0, 1, 2, 3], "from 0 to 2"),
        (np.zeros([3, 4]), [0, 1, 2, -1], "from 0 to 2"),
        (np.zeros([4]), [0], r"\[pictures, texts\]"),
        (np.full([2, 2], np.nan), [0, 1], "not all numbers"),
        (np.zeros([0, 0]), np.zeros(0, int), "must be some"),
    ],
)
def test_scores_that_cannot_be_used(similarity, owner, told):
    with pytest.raises(DataError, match=told):
        retrieval_recalls(similarity, owner)


def test_dual_softmax_prefers_what_others_leave():
    """Text 0 likes clip 1 a little more than its own, but clip 1 belongs to text 1 far more clearly."""
    scores = np.array([[0.50, 0.52], [0.1, 0.9]])
    to_clip, to_text = dual_softmax(scores)
    assert to_clip[0].argmax() == 0 and scores[0].argmax() == 1
    by_hand = scores[0, 1] * np.exp(scores[0, 1]) / np.exp(scores[:, 1]).sum()
    assert to_clip[0, 1] == pytest.approx(by_hand)
    by_hand = scores[1, 0] * np.exp(scores[1, 0]) / np.exp(scores[1]).sum()
    assert to_text[0, 1] == pytest.approx(by_hand)


def test_accuracies_by_hand():
    scores = np.array([[3, 2, 1, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]])
    found = accuracy(scores, np.array([0, 5, 5, 1]))
    assert found == {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": pytest.approx((1 + 0.5 + 0) / 3)}
    with pytest.raises(DataError, match="not all numbers"):
        accuracy(np.full([1, 2], np.inf), np.array([0]))


def test_names_from_json(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('["dog", "cat"]', encoding="utf-8")
    assert read_names(str(path), "class names") == ["dog", "cat"]
    path.write_text('{"en": ["dog"], "cn": ["狗"]}', encoding="utf-8")
    assert read_names(f"{path}#cn", "class names") == ["狗"]
    for text, told in (
        ('{"en": ["dog"]}', "choose one as"),
        ("[1]", "JSON list of texts"),
        ("[", "not valid JSON"),
        ("[]", "list"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=told):
            read_names(str(path), "class names")
    with pytest.raises(DataError, match="has no {c}"):
        zero_shot_weights(load().model, load().tokenizer, ["dog"], ["a photo"])
