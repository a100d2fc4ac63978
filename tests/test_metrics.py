from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squid_fast import metrics as evaluation
from squid_fast.metrics import (
    OperatingPoint,
    best_test_accuracy,
    bootstrap_auroc_interval,
    evaluate,
    image_auprc,
    image_auroc,
    operating_point,
    plot_roc,
    threshold_at_false_positive_rate,
)

metrics = pytest.importorskip("sklearn.metrics", reason="needs the 'train' extra")

# Ranked from the most to the least suspicious: 1 1 0 1 0 0 -> of 9 pairs 8 in order.
LABELS = [0, 1, 0, 1, 1, 0]
Z = [0.5, 3.0, 1.5, 1.0, 2.0, -1.0]


def shifted_normals(
    rng: np.random.Generator, normal: int, anomalous: int, shift: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([0, 1], [normal, anomalous])
    return labels, rng.standard_normal(normal + anomalous) + shift * labels


@st.composite
def tied_scores(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Both classes present, and few distinct scores, so that most of them are tied."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=20))]
    size = len(labels)
    return labels, draw(
        st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=size, max_size=size)
    )


class TestRanking:
    def test_by_hand(self):
        assert image_auroc(LABELS, Z) == pytest.approx(8 / 9)
        assert image_auroc(np.array(LABELS, dtype=bool), Z) == pytest.approx(8 / 9)
        # precision at the three anomalous images: 1/1, 2/2, 3/4
        assert image_auprc(LABELS, Z) == pytest.approx((1 + 1 + 3 / 4) / 3)

    def test_larger_z_means_less_normal(self):
        assert image_auroc([0, 0, 1], [-2.0, -1.0, 5.0]) == 1.0
        assert image_auroc([0, 0, 1], [2.0, 1.0, -5.0]) == 0.0

    def test_ties_count_half(self):
        assert image_auroc([0, 1], [1.0, 1.0]) == 0.5
        assert image_auroc([0, 0, 1], [0.0, 1.0, 1.0]) == 0.75

    def test_z_keeps_an_order_that_float32_sigmoid_loses(self):
        z = np.array([20.0, 30.0], dtype=np.float32)
        saturated = np.float32(1) / (np.float32(1) + np.exp(-z))
        assert image_auroc([0, 1], saturated) == 0.5
        assert image_auroc([0, 1], z) == 1.0


class TestRefusals:
    @pytest.mark.parametrize(
        ("labels", "z", "sentence"),
        [
            ([], [], "z is empty; there is no image to evaluate"),
            ([0, 0], [1.0, 2.0], "all 2 images are normal: it takes at least one anomalous image"),
            ([1], [1.0], "all 1 images are anomalous: it takes at least one normal image"),
            ([0, 1, 1], [1.0, math.nan, 2.0], "1 of 3 scores in z are not finite.*position 1: nan"),
            ([0, 1, 1], [math.inf, 0.0, -math.inf], "2 of 3 scores in z are not.*position 0: inf"),
            ([0, 1], [1.0, 2.0, 3.0], r"labels have the shape \(2,\) and z has \(3,\)"),
            ([0, 2], [1.0, 2.0], "labels contain 2; they must be 0 for normal and 1 for anomalous"),
            ([[0, 1]], [[1.0, 2.0]], r"z has the shape \(1, 2\); it must hold one score per image"),
        ],
    )
    @pytest.mark.parametrize(
        "function",
        [
            image_auroc, image_auprc, bootstrap_auroc_interval, best_test_accuracy,
            partial(operating_point, threshold=0.0), partial(evaluate, score_name="any"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_evaluated(self, function, labels, z, sentence):
        with pytest.raises(ValueError, match=sentence):
            function(labels, z)

    def test_bootstrap_arguments(self):
        with pytest.raises(ValueError, match="confidence is 95; it must lie between 0 and 1"):
            bootstrap_auroc_interval(LABELS, Z, confidence=95)
        with pytest.raises(ValueError, match="resamples is 0; it must be at least 1"):
            bootstrap_auroc_interval(LABELS, Z, resamples=0)

    def test_other_arguments(self):
        with pytest.raises(ValueError, match="threshold is nan; it must be a finite number"):
            operating_point(LABELS, Z, math.nan)
        with pytest.raises(ValueError, match=r"false_positive_rate is 0.1, but there is no thresh"):
            evaluate(LABELS, Z, score_name="any", false_positive_rate=0.1)


class TestBootstrap:
    @given(tied_scores(), st.integers(0, 2**16))
    @settings(max_examples=50, deadline=None)
    def test_every_resample_has_the_auroc_that_sklearn_computes(self, sample, seed):
        labels, z = np.array(sample[0]), np.array(sample[1])
        distinct, rank = np.unique(z, return_inverse=True)
        rng = np.random.default_rng(seed)
        counts = [
            evaluation._resampled_counts(rank[labels == label], len(distinct), 3, rng)
            for label in (0, 1)
        ]
        for row, area in enumerate(evaluation._areas(*counts)):
            resampled = [np.repeat(distinct, count[row]) for count in counts]
            assert [len(part) for part in resampled] == [(labels == 0).sum(), (labels == 1).sum()]
            y = np.repeat([0, 1], [len(part) for part in resampled])
            assert area == pytest.approx(metrics.roc_auc_score(y, np.concatenate(resampled)))

    def test_agrees_with_the_analytic_standard_error(self):
        labels, z = shifted_normals(np.random.default_rng(3), 234, 390)
        low, high = bootstrap_auroc_interval(labels, z)
        # DeLong: the variances of the two classes' placement values, over their sizes.
        above = (z[labels == 1][:, None] > z[labels == 0][None, :]).astype(float)
        error = math.sqrt(
            above.mean(0).var(ddof=1) / above.shape[1] + above.mean(1).var(ddof=1) / above.shape[0]
        )
        area = above.mean()
        assert low == pytest.approx(area - 1.96 * error, abs=0.2 * error)
        assert high == pytest.approx(area + 1.96 * error, abs=0.2 * error)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
        rng = np.random.default_rng(0)
        intervals = [
            bootstrap_auroc_interval(*shifted_normals(rng, 60, 60), 0.9, resamples=400)
            for _ in range(200)
        ]
        covered = sum(low <= truth <= high for low, high in intervals)
        assert 170 <= covered <= 192  # 180 expected, standard deviation 4.2

    def test_seed_decides(self):
        labels, z = shifted_normals(np.random.default_rng(1), 30, 40)
        first, again, other = (bootstrap_auroc_interval(labels, z, seed=s) for s in (0, 0, 1))
        assert bootstrap_auroc_interval(labels, z) == first == again != other
        assert evaluate(labels, z, score_name="instance", seed=1).auroc_interval == other

    def test_separated_classes(self):
        assert bootstrap_auroc_interval([0, 0, 1, 1], [0, 1, 2, 3]) == (1.0, 1.0)

    def test_memory_is_bounded_by_chunks(self, monkeypatch):
        labels, z = shifted_normals(np.random.default_rng(1), 30, 40)
        whole = bootstrap_auroc_interval(labels, z, resamples=3000)
        monkeypatch.setattr(evaluation, "_CHUNK", 70 * 37)  # does not divide the 3000
        assert bootstrap_auroc_interval(labels, z, resamples=3000) == pytest.approx(whole, abs=0.01)

    def test_is_fast_enough_for_every_evaluation(self):
        labels, z = shifted_normals(np.random.default_rng(1), 234, 390)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            bootstrap_auroc_interval(labels, z)
            best = min(best, time.perf_counter() - start)
        assert best < 1.0


class TestCalibration:
    @pytest.mark.parametrize(
        ("n", "rate", "threshold"),
        [
            (100, 0.05, 94),  # 95 to 99 exceed it
            (20, 0.05, 18),
            (39, 0.05, 37),  # 1.95 may exceed it, so 1 does
            (100, 0.29, 70),  # 0.29 * 100 is 28.999999999999996
            (10, 0.5, 4),
            (2, 0.5, 0),
        ],
    )
    def test_by_hand(self, n, rate, threshold):
        scores = np.random.default_rng(0).permutation(n).astype(float)
        assert threshold_at_false_positive_rate(scores, rate) == threshold

    def test_ties_may_leave_fewer_above_but_never_more(self):
        assert threshold_at_false_positive_rate([0, 1, 1, 1], 0.5) == 1  # not 0: three exceed it
        assert threshold_at_false_positive_rate([0, 0, 0, 1], 0.5) == 0

    @given(
        st.lists(st.integers(-5, 5), min_size=10, max_size=60),
        st.floats(0.1, 0.99, exclude_min=True),
    )
    @settings(deadline=None)
    def test_smallest_that_keeps_the_rate(self, scores, rate):
        z = np.array(scores, dtype=float)
        threshold = threshold_at_false_positive_rate(z, rate)
        assert (z > threshold).mean() <= rate + 1e-9
        assert (z > np.nextafter(threshold, -np.inf)).mean() > rate

    def test_rate_on_new_images(self):
        rng = np.random.default_rng(0)
        rates = [
            (rng.standard_normal(500) > threshold_at_false_positive_rate(calibration, 0.1)).mean()
            for calibration in rng.standard_normal((400, 50))
        ]
        # 5 of 50 exceed it; a new one does with 6 in 51.
        assert np.mean(rates) == pytest.approx(6 / 51, abs=0.008)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"19 normal scores are too few.* 0.05: .*at least 20"):
            threshold_at_false_positive_rate(np.arange(19), 0.05)
        with pytest.raises(ValueError, match="at least 100, or a higher rate"):
            threshold_at_false_positive_rate(np.arange(20), 0.01)
        with pytest.raises(ValueError, match="rate is 5; it must lie between 0 and 1"):
            threshold_at_false_positive_rate(np.arange(20), 5)
        with pytest.raises(ValueError, match="normal_z are not finite, the first at position 1"):
            threshold_at_false_positive_rate([0.0, math.nan], 0.5)
        with pytest.raises(ValueError, match="normal_z is empty"):
            threshold_at_false_positive_rate([], 0.5)


class TestOperatingPoints:
    def test_by_hand(self):
        # flagged: 3.0 (right), 2.0 (right), 1.5 (wrong); missed: 1.0, which is not above itself
        share = pytest.approx(2 / 3)
        expected = OperatingPoint(1.0, share, share, share, sensitivity=share, specificity=share)
        assert operating_point(LABELS, Z, 1.0) == expected

    def test_nothing_flagged(self):
        assert operating_point([0, 1, 1], [1.0, 2.0, 3.0], 3.0) == OperatingPoint(
            3.0, pytest.approx(1 / 3), f1=0.0, precision=0.0, sensitivity=0.0, specificity=1.0
        )

    @given(tied_scores(), st.sampled_from([-2.0, -1.5, 0.0, 1.0, 2.0]))
    @settings(deadline=None)
    def test_agrees_with_sklearn(self, sample, threshold):
        labels, z = np.array(sample[0]), np.array(sample[1])
        flagged = (z > threshold).astype(int)
        expected = {
            "threshold": threshold,
            "accuracy": metrics.accuracy_score(labels, flagged),
            "f1": metrics.f1_score(labels, flagged, zero_division=0),
            "precision": metrics.precision_score(labels, flagged, zero_division=0),
            "sensitivity": metrics.recall_score(labels, flagged),
            "specificity": metrics.recall_score(labels, flagged, pos_label=0),
        }
        assert vars(operating_point(labels, z, threshold)) == pytest.approx(expected)

    def test_best_test_accuracy_by_hand(self):
        # 1 1 0 1 0 0 from the top: flagging two or four images is right for five of six; the
        # higher threshold counts, and flags the two above 1.5.
        point = best_test_accuracy(LABELS, Z)
        assert point.threshold == 1.5
        assert point.accuracy == pytest.approx(5 / 6)
        assert (point.precision, point.specificity) == (1.0, 1.0)
        assert point.sensitivity == pytest.approx(2 / 3)
        assert point.f1 == pytest.approx(4 / 5)

    def test_best_test_accuracy_may_flag_all_or_nothing(self):
        everything = best_test_accuracy([0, 1, 1, 1], [9.0, 1.0, 1.0, 1.0])
        assert (everything.accuracy, everything.sensitivity) == (0.75, 1.0)
        assert everything.threshold < 1.0
        nothing = best_test_accuracy([1, 0, 0, 0], [1.0, 9.0, 9.0, 9.0])
        assert (nothing.accuracy, nothing.specificity, nothing.threshold) == (0.75, 1.0, 9.0)

    @given(tied_scores())
    @settings(deadline=None)
    def test_best_test_accuracy_beats_every_threshold(self, sample):
        labels, z = sample
        best = best_test_accuracy(labels, z)
        accuracies = {t: operating_point(labels, z, t).accuracy for t in (min(z) - 1, *z)}
        assert best.accuracy == max(accuracies.values())
        assert all(accuracies[t] < best.accuracy for t in z if t > best.threshold)


class TestEvaluate:
    def test_every_figure(self):
        calibration = np.arange(100) / 10  # at 5 %: 9.4, above every test score
        threshold = threshold_at_false_positive_rate(calibration - 8.0, 0.05)
        result = evaluate(
            LABELS, Z, score_name="instance", threshold=threshold, false_positive_rate=0.05
        )
        assert (result.score_name, result.n_normal, result.n_anomalous) == ("instance", 3, 3)
        assert result.auroc == pytest.approx(8 / 9)
        assert result.auprc == pytest.approx(11 / 12)
        assert result.auroc_interval == bootstrap_auroc_interval(LABELS, Z)
        assert result.paper_best_test_accuracy == best_test_accuracy(LABELS, Z)
        assert result.calibrated == operating_point(LABELS, Z, threshold)
        assert result.calibrated.threshold == pytest.approx(1.4)
        assert result.false_positive_rate == 0.05
        plain = evaluate(LABELS, Z, score_name="instance")
        assert plain == replace(result, calibrated=None, false_positive_rate=None)

    def test_json(self):
        labels, z, threshold = np.array(LABELS), np.array(Z, dtype=np.float32), np.float32(1.0)
        result = evaluate(
            labels, z, score_name="instance", threshold=threshold, false_positive_rate=0.05
        )
        back = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert back == result.to_json()
        assert list(back) == [
            "score_name", "n_normal", "n_anomalous", "auroc", "auroc_interval", "auprc",
            "paper_best_test_accuracy", "calibrated", "false_positive_rate",
        ]  # fmt: skip
        assert back["auroc_interval"] == list(result.auroc_interval)
        assert back["calibrated"]["threshold"] == 1.0
        assert back["calibrated"]["accuracy"] == pytest.approx(4 / 6)


class TestPicture:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib", reason="needs the 'train' extra")

    def test_curves_and_legend(self, tmp_path):
        path = tmp_path / "roc.svg"
        with evaluation.require("matplotlib", "train").rc_context({"svg.fonttype": "none"}):
            plot_roc(path, {"instance": (LABELS, Z), "running": ([0, 1], [1.0, 1.0])})
        text = path.read_text()
        for words in ("instance  0.889", "running  0.500", "chance  0.500", "sensitivity", "AUROC"):
            assert words in text

    def test_png_shows_the_curve(self, tmp_path):
        path = tmp_path / "roc.png"
        plot_roc(path, {"perfect": ([0, 1], [0.0, 1.0])})
        pixels = evaluation.require("matplotlib.image", "train").imread(path)[..., :3]
        colour = np.array([31, 119, 180]) / 255  # the first of matplotlib's cycle
        rows, columns = np.nonzero(np.abs(pixels - colour).max(-1) < 0.02)
        height, width = np.ptp(rows), np.ptp(columns)
        assert min(height, width) > 0.7 * pixels.shape[0]  # along the left and the top, full length
        assert height == pytest.approx(width, abs=5)  # one unit is as long on both axes

    def test_leaves_pyplot_alone(self, tmp_path):
        plot_roc(tmp_path / "roc.png", {"instance": (LABELS, Z)})
        pyplot = evaluation.require("matplotlib.pyplot", "train")
        assert pyplot.get_fignums() == []

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="there is no curve to draw"):
            plot_roc(tmp_path / "roc.png", {})
        with pytest.raises(ValueError, match="running: all 2 images are normal"):
            plot_roc(tmp_path / "roc.png", {"running": ([0, 0], [1.0, 2.0])})
        assert list(tmp_path.iterdir()) == []
