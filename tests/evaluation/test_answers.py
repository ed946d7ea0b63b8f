import pytest
import torch
from torch import nn

from bnnft.evaluation.answers import ClassAnswers


def judged(scores, targets):
    right, answered = ClassAnswers()(nn.Identity(), (scores, targets))
    return right.tolist(), answered.tolist()


@pytest.mark.parametrize("shape", [(24, 3), (6, 3, 4), (6, 3, 4, 5), (24, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_the_highest_score_in_dimension_one_is_the_answer(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    targets = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator).to(dtype)
    expected = [
        max(range(shape[1]), key=lambda each: row[each]) == target
        for row, target in zip(
            scores.movedim(1, -1).reshape(-1, shape[1]).tolist(), targets.flatten().tolist(), strict=True
        )
    ]
    right, answered = ClassAnswers()(nn.Identity(), (scores, targets))
    assert right.flatten().tolist() == expected
    assert any(expected)
    assert not all(expected)
    assert answered.all()


@pytest.mark.parametrize(
    ("scores", "right", "answered"),
    [
        ([[0.0, 1.0]], [True], [True]),
        ([[float("-inf"), 1.0]], [True], [True]),  # a class that is masked out
        ([[0.0, float("nan")]], [False], [False]),
        ([[float("nan"), 1.0]], [False], [False]),
        ([[0.0, float("inf")]], [False], [False]),
        ([[float("-inf"), float("-inf")]], [False], [False]),
    ],
)
def test_what_is_not_finite_is_no_answer(scores, right, answered):
    assert judged(torch.tensor(scores), torch.tensor([1])) == (right, answered)


FLOAT = torch.zeros(4, 3)
UNSUITABLE = {
    "one score, float targets": (torch.zeros(4, 1), torch.zeros(4)),
    "one score, integer targets": (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
    "no classes": (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
    "targets of two dimensions": (FLOAT, torch.zeros(4, 1, dtype=torch.int64)),
    "one-hot targets": (FLOAT, torch.zeros(4, 3, dtype=torch.int64)),
    "several labels": (FLOAT, torch.zeros(4, 3)),
    "float classes": (FLOAT, torch.zeros(4)),
    "bool targets": (FLOAT, torch.zeros(4, dtype=torch.bool)),
    "bool scores": (FLOAT.bool(), torch.zeros(4, dtype=torch.int64)),
    "complex scores": (FLOAT.to(torch.complex64), torch.zeros(4, dtype=torch.int64)),
    "classes last": (torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.int64)),
    "classes in the middle or last": (torch.zeros(4, 3, 3), torch.zeros(4, 3, dtype=torch.int64)),
    "another number of samples": (FLOAT, torch.zeros(1, dtype=torch.int64)),
    "a class too many": (FLOAT, torch.tensor([0, 1, 2, 3])),
    "a target to be ignored": (FLOAT, torch.tensor([0, 1, 2, -100])),
    "a dict of scores": ({"logits": FLOAT}, torch.zeros(4, dtype=torch.int64)),
    "a list of targets": (FLOAT, [0, 1, 2, 1]),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_answers_that_are_none_of_a_classifier_are_one_error_with_both_ways_out(case):
    scores, targets = UNSUITABLE[case]
    with pytest.raises(ValueError, match=r"accuracy needs class scores .* got scores .* and targets .*") as error:
        judged(scores, targets)
    assert "correct=" in str(error.value)
    assert "score=" in str(error.value)


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), {"x": 1}, (1, 2, 3), [torch.zeros(2)]], ids=str)
def test_batches_that_are_no_pair_are_the_same_error(batch):
    with pytest.raises(ValueError, match=r"accuracy needs batches \(inputs, targets\), got .*correct=.*score="):
        ClassAnswers()(nn.Identity(), batch)


def test_targets_of_each_batch_are_looked_at():
    answers, good, bad = ClassAnswers(), torch.tensor([0, 1]), torch.tensor([0, 7])
    for _ in range(2):
        answers(nn.Identity(), (torch.zeros(2, 3), good))
    with pytest.raises(ValueError, match="the targets go from 0 to 7"):
        answers(nn.Identity(), (torch.zeros(2, 3), bad))


def test_an_empty_batch_has_no_answers():
    assert judged(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == ([], [])
