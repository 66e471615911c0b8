"""The success detector's measures against slow references, and one small run of them."""

import json

import home_accuracy
import numpy as np
import pytest
from reproduce import digest


def test_average_precision_equals_a_slow_reference():
    rng = np.random.default_rng(0)
    score, label = rng.random(300), rng.random(300) < 0.1
    precisions = []
    for own in score[label]:
        above = score >= own
        precisions.append((above & label).sum() / above.sum())
    assert home_accuracy.average_precision(score, label) == pytest.approx(np.mean(precisions))
    assert home_accuracy.average_precision(label.astype(float), label) == 1
    assert home_accuracy.average_precision(-label.astype(float), label) < 0.1


def test_precision_and_recall_count_pairs():
    score = np.array([0.95, 0.85, 0.4, 0.4, 0.05, 0.05])
    reached = np.array([1, 0, 1, 0, 0, 1], bool)
    in_view = np.array([1, 1, 1, 1, 1, 0], bool)
    over_beta = home_accuracy.measure(score, reached, in_view)["over_beta"]
    assert over_beta["0.3"] == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "recall_in_view": 1, "false_positive_rate": 2 / 3}
    )
    assert over_beta["0.9"]["precision"] == 1
    assert (
        home_accuracy.measure(score - 1, reached, in_view)["over_beta"]["0.1"]["precision"] is None
    )


def test_walks_in_homes_are_measured(tmp_path, random_clip):
    args = home_accuracy.Args(
        clip_model=str(random_clip), homes=16, output=tmp_path / "home_accuracy.json", workers=2
    )
    home_accuracy.main(args)
    result = json.loads(args.output.read_text())
    assert result["frames"] == 16 * 34 and result["clip"] == digest(random_clip)
    for families in result["alphas"]["0"].values():
        for family, goals in (("find", 1), ("lift", 1), ("place", 3)):
            assert families[family]["pairs"] % (goals * result["frames"]) == 0
    train = result["alphas"]["0"]["train"]
    assert all(numbers["true"] > 0 for numbers in train.values())  # the solver reaches all three
    verbs = result["verbs"]["train"]
    assert verbs.keys() == train.keys() and verbs["find"] != train["find"]
    verbs = {home_accuracy.verb(goal) for goal in home_accuracy.GOALS}
    assert {"find a red ball", "lift a red ball", "put a red ball on the bed"} <= verbs
    assert len(verbs) == len(home_accuracy.GOALS)
    assert "| train | place |" in args.output.with_suffix(".md").read_text()
