"""The comparison of methods: paired by seed, with numbers that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from supmer_ray.fewshot.comparison import AVERAGE, gaps, markdown, paired, summarize

SEEDS = range(6)


def rows(scores, **fixed):
    """Rows of {method: accuracies by seed} on one task."""
    return [
        {"point": "", "method": method, "train": "a", "test": "a", "seed": seed, "shots": 16, "dev_accuracy": 0.5,
         "test_accuracy": value, "best_step": 10, "seconds": 2.0, "trained_parameters": 100} | fixed
        for method, values in scores.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]  # fmt: skip


PT = [0.60, 0.62, 0.58, 0.70, 0.61, 0.65]
BETTER = [0.66, 0.69, 0.61, 0.77, 0.63, 0.72]


def test_differences_are_taken_seed_by_seed():
    found = paired(np.array(BETTER), np.array(PT))
    differences = np.array(BETTER) - PT
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["p"] == pytest.approx(scipy.stats.ttest_rel(BETTER, PT).pvalue)
    assert differences.min() < found["low"] < found["difference"] < found["high"] < differences.max()
    # As wide as Student's, and shifted where the differences lean to one side.
    student = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
    assert found["high"] - found["low"] == pytest.approx(student.high - student.low, rel=0.15)


@pytest.mark.parametrize(("seeds", "least"), [(2, 0.91), (3, 0.91), (4, 0.91), (5, 0.89), (10, 0.92)])
def test_the_interval_holds_what_it_says(monkeypatch, seeds, least):
    """Draws with a true difference of 0: the interval holds it nearly as often as it says, with few seeds too."""
    monkeypatch.setattr("supmer_ray.fewshot.comparison.RESAMPLES", 999)
    generator = np.random.default_rng(0)
    drawn = [paired(generator.normal(size=seeds), np.zeros(seeds)) for _ in range(400)]
    assert least < np.mean([one["low"] <= 0 <= one["high"] for one in drawn]) < 0.98


def test_pairing_finds_what_spread_would_hide():
    shifted = np.array(PT) + 0.02 + np.array([0.001, -0.001, 0, 0.001, -0.001, 0])
    assert paired(shifted, np.array(PT))["p"] < 1e-4
    assert scipy.stats.ttest_ind(shifted, PT).pvalue > 0.1


@pytest.mark.parametrize(("one", "other"), [([0.7], [0.6]), ([0.7, 0.8], [0.6, 0.7]), ([0.5] * 4, [0.5] * 4)])
def test_too_few_pairs_or_equal_differences_have_no_test(one, other):
    found = paired(np.array(one), np.array(other))
    assert found["difference"] == pytest.approx(np.mean(one) - np.mean(other))
    assert np.isnan([found["low"], found["high"], found["p"]]).all()


def test_summary_by_hand():
    table = pd.DataFrame(
        rows({"prompt-tuning": PT, "supmer": BETTER})
        + rows({"prompt-tuning": BETTER, "supmer": PT}, train="b", test="b", seconds=4.0)
        + rows({"prompt-tuning": [0.1] * 6, "supmer": [0.2] * 6}, train="a", test="b")
    )
    found = summarize(table, "prompt-tuning").set_index(["train", "test", "method"])
    one = found.loc[("a", "a", "supmer")]
    assert one["mean"] == pytest.approx(100 * np.mean(BETTER))
    assert one["sd"] == pytest.approx(100 * np.std(BETTER, ddof=1))
    assert one["difference"] == pytest.approx(100 * (np.mean(BETTER) - np.mean(PT)))
    assert np.isnan(found.loc[("a", "a", "prompt-tuning")]["difference"])
    average = found.loc[(AVERAGE, AVERAGE, "supmer")]
    assert average["mean"] == pytest.approx(50 * (np.mean(BETTER) + np.mean(PT)))
    assert average["difference"] == pytest.approx(0, abs=1e-9)
    assert average["sd"] == pytest.approx(50 * (np.std(BETTER, ddof=1) + np.std(PT, ddof=1)))
    assert average["seconds"] == 3.0 and average["seeds"] == 6


def test_order_of_rows_and_missing_seeds_do_not_matter():
    table = pd.DataFrame(rows({"prompt-tuning": PT, "supmer": BETTER}))
    shuffled = pd.concat([table.iloc[:6].iloc[::-1], table.iloc[6:]])
    pd.testing.assert_frame_equal(summarize(table, "prompt-tuning"), summarize(shuffled, "prompt-tuning"))
    partial = summarize(table.drop(index=0), "prompt-tuning").set_index("method")
    assert partial.loc["supmer", "difference"] == pytest.approx(100 * np.mean(np.array(BETTER[1:]) - PT[1:]))


def test_gaps_by_hand():
    outside = {"prompt-tuning": [0.5] * 6, "supmer": [value - 0.01 for value in BETTER]}
    inside = {"prompt-tuning": PT, "supmer": BETTER}
    table = pd.DataFrame(
        rows(inside) + rows(outside, test="b") + rows(inside, train="b", test="b") + rows(inside, train="b", test="a")
    )
    found = gaps(table, "prompt-tuning").set_index(["train", "method"])
    assert found.loc[("a", "prompt-tuning"), "gap"] == pytest.approx(100 * np.mean(PT) - 50)
    assert found.loc[("a", "supmer"), "gap"] == pytest.approx(1)
    assert found.loc[("a", "supmer"), "relative_gap"] == pytest.approx(1 / (100 * np.mean(PT) - 50))
    assert found.loc[("a", "supmer"), "difference"] == pytest.approx(100 * np.mean(PT) - 51)
    assert found.loc[(AVERAGE, "supmer"), "gap"] == pytest.approx(0.5)
    assert gaps(pd.DataFrame(rows({"prompt-tuning": PT})), "prompt-tuning").empty


def test_gaps_are_compared_over_the_seeds_that_both_have():
    outside = {"prompt-tuning": [0.5] * 6, "supmer": [value - 0.01 * seed for seed, value in enumerate(BETTER)]}
    table = pd.DataFrame(rows({"prompt-tuning": PT, "supmer": BETTER}) + rows(outside, test="b"))
    without = (table["method"] == "prompt-tuning") & (table["seed"] == 3)
    found = gaps(table[~without], "prompt-tuning").set_index("method").loc["supmer"]
    own, other = np.array([0, 1, 2, 4, 5]), 100 * np.delete(PT, 3) - 50
    assert found["difference"] == pytest.approx(np.mean(other - own))
    assert found["relative_gap"] == pytest.approx(np.mean(own) / np.mean(other))
    assert found["p"] == pytest.approx(scipy.stats.ttest_rel(other, own).pvalue)


@pytest.mark.parametrize("say", [summarize, gaps])
def test_each_point_is_summed_up_for_itself(say):
    def at(point, shift):
        inside = {"prompt-tuning": PT, "supmer": [value * (1 + shift) for value in PT]}
        outside = {name: [value - 0.1 - shift for value in PT] for name in inside}
        return [
            row
            for train, test in (("a", "b"), ("b", "a"))
            for scores, tested in ((inside, train), (outside, test))
            for row in rows(scores, point=point, train=train, test=tested)
        ]

    one, other = at("K = 1", 0.01), at("K = 2", 0.05)
    both = say(pd.DataFrame(one + other), "prompt-tuning")
    apart = pd.concat([say(pd.DataFrame(own), "prompt-tuning") for own in (one, other)])
    names = [name for name in ("point", "train", "test", "method") if name in both]
    pd.testing.assert_frame_equal(both.set_index(names).sort_index(), apart.set_index(names).sort_index())


def written(table):
    """The Markdown of the rows' tables."""
    drops = gaps(table, "prompt-tuning")
    return markdown(summarize(table, "prompt-tuning"), drops, "prompt-tuning", "Title", "A note.")


def test_several_other_domains_count_as_their_mean():
    outside = {"prompt-tuning": [0.5] * 6, "supmer": [value - 0.01 for value in BETTER]}
    further = {"prompt-tuning": [0.4] * 6, "supmer": [value - 0.05 for value in BETTER]}
    inside = {"prompt-tuning": PT, "supmer": BETTER}
    table = pd.DataFrame(
        rows(inside)
        + rows(outside, test="b")
        + rows(further, test="c")
        + rows(inside, train="d", test="d")
        + rows(inside, train="d", test="e")
    )
    found = gaps(table, "prompt-tuning").set_index(["train", "method"])
    assert found.loc[("a", "prompt-tuning"), "out_of_domain"] == pytest.approx(45)
    assert found.loc[("a", "supmer"), "gap"] == pytest.approx(3)
    assert found.loc[("a", "supmer"), "difference"] == pytest.approx(100 * np.mean(PT) - 45 - 3)
    # A source counts once in the average, however many domains it was tested on.
    assert found.loc[(AVERAGE, "supmer"), "gap"] == pytest.approx(1.5)
    assert found.loc[(AVERAGE, "prompt-tuning"), "gap"] == pytest.approx((100 * np.mean(PT) - 45) / 2)
    shuffled = gaps(table.iloc[::-1], "prompt-tuning").set_index(["train", "method"])
    pd.testing.assert_frame_equal(shuffled.loc[found.index], found)
    text = written(table)
    assert "| a | supmer | 68.0 | 65.0 | 3.0 |" in text and "a → b" in text and "a → c" in text


def test_markdown_says_what_the_summary_says():
    outside = {"prompt-tuning": [0.5] * 6, "supmer": [value - 0.01 for value in BETTER]}
    table = pd.DataFrame(
        rows({"prompt-tuning": PT, "supmer": BETTER, "zero-shot": [0.55] * 6}) + rows(outside, test="b")
    )
    text = written(table)
    assert text.startswith("# Title\n\nA note.\n")
    assert "| prompt-tuning | 62.7 ± 4.3 | 50.0 ± 0.0 |" in text
    assert "| zero-shot | 55.0 ± 0.0 | – |" in text
    assert "| supmer | +5.3 [" in text and "| a | supmer | 68.0 | 67.0 | 1.0 | +11.7 [" in text
    assert "a → b" in text and "| supmer | 2.0 | 100 |" in text
    only = written(table[table["method"] == "supmer"])
    assert "Difference to" not in only and "| a | supmer | 68.0 | 67.0 | 1.0 | – | – |" in only
