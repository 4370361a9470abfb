"""Counts and scores: hand-computed cases, the exact threshold, empty masks, sums that do not depend on who counted."""

import math

import pytest
import torch

from sft.metrics import THRESHOLDS, counts, dice, iou, precision, recall, summarize, thresholds


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def counts_of_random_images(images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(images)
    logits = 3 * torch.randn(images, 16, 12, generator=generator)
    masks = torch.rand(images, 16, 12, generator=generator) < (0.2 + 0.1 * logits).clamp(0, 1)
    return counts(logits, masks)


def test_the_sweep_holds_exactly_one_half_and_the_threshold_asked_for():
    assert 0.5 in THRESHOLDS
    assert THRESHOLDS[0] == 0.02 and THRESHOLDS[-1] == 0.98
    assert thresholds(0.5) == THRESHOLDS
    assert set(thresholds(0.123)) == {*THRESHOLDS, 0.123}
    assert list(thresholds(0.001)) == sorted(thresholds(0.001))


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        thresholds(threshold)


def test_counts_of_a_2x3_image_by_hand():
    logits = torch.tensor([[logit(0.9), logit(0.6), logit(0.4)], [logit(0.7), logit(0.1), logit(0.3)]])
    masks = torch.tensor([[1, 0, 1], [1, 0, 0]])
    table = counts(logits, masks)
    assert table.shape == (97, 3) and table.dtype == torch.int64
    assert table[THRESHOLDS.index(0.5)].tolist() == [2, 1, 1]
    assert table[THRESHOLDS.index(0.2)].tolist() == [3, 2, 0]
    assert table[THRESHOLDS.index(0.65)].tolist() == [2, 0, 1]
    assert table[THRESHOLDS.index(0.95)].tolist() == [0, 0, 3]


def test_a_probability_equal_to_the_threshold_is_not_predicted():
    edge = torch.tensor(logit(0.3), dtype=torch.float32)
    logits = torch.stack((edge, edge.nextafter(torch.tensor(9.0))))[None]
    assert counts(logits, torch.ones(1, 2))[THRESHOLDS.index(0.3)].tolist() == [1, 0, 1]
    assert counts(torch.zeros(1, 2), torch.ones(1, 2))[THRESHOLDS.index(0.5)].tolist() == [0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.5, 0.123])
def test_counts_equal_a_plain_loop_over_thresholds(dtype, threshold):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 20, 30, generator=generator)).to(dtype)
    masks = torch.rand(3, 20, 30, generator=generator) < 0.3
    table = counts(logits, masks, threshold)
    for image in range(3):
        assert torch.equal(table[image], counts(logits[image], masks[image], threshold))
        for row, value in zip(table[image], thresholds(threshold), strict=True):
            predicted = logits[image].float() > logit(value)
            tp, fp, fn = predicted & masks[image], predicted & ~masks[image], ~predicted & masks[image]
            assert row.tolist() == [tp.sum(), fp.sum(), fn.sum()]


def test_infinite_logits_count_as_certain():
    table = counts(torch.tensor([[math.inf, -math.inf]]), torch.tensor([[True, True]]))
    assert (table == torch.tensor([1, 0, 1])).all()


def test_a_nan_logit_is_an_error_not_a_vessel():
    with pytest.raises(ValueError, match="NaN"):
        counts(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2))


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        counts(torch.zeros(4, 4), torch.zeros(4, 1))


def test_scores_by_hand():
    table = torch.tensor([6, 2, 4])
    assert dice(table).item() == 12 / 18
    assert iou(table).item() == 6 / 12
    assert recall(table).item() == 6 / 10
    assert precision(table).item() == 6 / 8
    assert dice(table).dtype == torch.float64


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([0, 0, 0], (1, 1, 1, 1)),  # both empty
        ([0, 5, 0], (0, 0, 0, 0)),  # the mask is empty, the prediction is not
        ([0, 0, 5], (0, 0, 0, 0)),  # the prediction is empty, the mask is not
        ([7, 0, 0], (1, 1, 1, 1)),
    ],
)
def test_scores_of_empty_masks_and_predictions(table, expected):
    assert tuple(score(torch.tensor(table)).item() for score in (dice, iou, recall, precision)) == expected


def test_scores_stay_exact_where_fp32_would_round():
    table = torch.tensor([2**30 + 1, 1, 0])
    assert precision(table).item() == (2**30 + 1) / (2**30 + 2) < 1


def test_summarize_takes_means_over_images_not_over_pixels():
    big, small = torch.tensor([900, 100, 0]), torch.tensor([1, 0, 9])
    summary = summarize(torch.stack((big, small))[:, None].expand(2, 97, 3))
    assert summary["dice"] == pytest.approx((1800 / 1900 + 2 / 11) / 2)
    assert summary["recall"] == pytest.approx((1 + 0.1) / 2)
    assert summary["precision"] == pytest.approx((0.9 + 1) / 2)
    assert summary["iou"] == pytest.approx((0.9 + 0.1) / 2)
    assert summary["dice_per_image"] == [1800 / 1900, 2 / 11]


def test_dice_best_is_where_the_mean_over_images_is_largest():
    # Vessel at probability 0.35, background at 0.155: every threshold between is right, and 0.34 is nearest to 0.5.
    logits = torch.tensor([[logit(0.35), logit(0.155)]])
    summary = summarize(counts(logits, torch.tensor([[1, 0]]))[None])
    assert (summary["dice"], summary["dice_best"], summary["threshold_best"]) == (0, 1, 0.34)


def test_ties_go_to_the_threshold_nearest_to_one_half():
    logits = torch.tensor([[logit(0.99), logit(0.01)]])
    assert summarize(counts(logits, torch.tensor([[1, 0]]))[None])["threshold_best"] == 0.5


def test_summarize_at_a_threshold_outside_the_sweep():
    logits = torch.tensor([[logit(0.0105), logit(0.009)]])
    summary = summarize(counts(logits, torch.tensor([[1, 0]]), 0.01)[None], 0.01)
    assert (summary["dice"], summary["dice_best"], summary["threshold_best"]) == (1, 1, 0.01)


def test_any_partition_over_ranks_sums_to_the_same_summary():
    whole = counts_of_random_images(23)
    expected = summarize(whole)
    generator = torch.Generator().manual_seed(5)
    for ranks in (1, 2, 3, 8):
        owner = torch.randint(ranks, (23,), generator=generator)
        shares = [torch.where((owner == rank)[:, None, None], whole, 0) for rank in range(ranks)]
        assert summarize(sum(shares)) == expected


def test_the_order_of_images_changes_no_bit_of_the_means():
    whole = counts_of_random_images(57)
    expected, backwards = summarize(whole), summarize(whole.flip(0))
    assert backwards.pop("dice_per_image") == expected.pop("dice_per_image")[::-1]
    assert backwards == expected


@pytest.mark.parametrize("shape", [(0, 97, 3), (4, 96, 3), (97, 3)])
def test_summarize_refuses_tables_that_are_not_images_by_sweep(shape):
    with pytest.raises(ValueError, match="at least one image"):
        summarize(torch.zeros(shape, dtype=torch.int64))
