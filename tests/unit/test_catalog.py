"""The catalog: real text, split by document, with nothing of a test split in the unlabeled text."""

import pandas as pd
import pytest

from supmer_ray.data import catalog
from supmer_ray.errors import UserError


@pytest.mark.parametrize("name", catalog.CATALOG_SOURCES)
def test_source_gives_distinct_train_documents(name):
    documents = list(catalog.unlabelled(name))
    assert len(documents) > 150
    assert len({document.id for document in documents}) == len(documents)
    assert all(document.text.strip() for document in documents)
    assert len({catalog._normal(document.text) for document in documents}) == len(documents)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("bbc", lambda document: document.id.split("/")[0]),
        ("rotten-tomatoes", lambda document: len(document.text) > 400),  # as plots are alone
    ],
)
def test_the_first_documents_are_a_sample_of_all(source, kind):
    """A store of a part of a source has its topics as the whole has them, within what chance does."""
    kinds = pd.Series([kind(document) for document in catalog.unlabelled(source)])
    shares, first = kinds.value_counts(normalize=True), kinds[:160].value_counts(normalize=True)
    assert len(shares) > 1
    assert (first.reindex(shares.index, fill_value=0) - shares).abs().max() < 0.12


@pytest.mark.parametrize("name", catalog.CATALOG_TASKS)
def test_task_splits_share_no_text(name):
    table = catalog.labelled(name)
    assert (table.columns[0], table.columns[-1]) == ("split", "label")
    assert set(table["split"]) == {"train", "test"}
    assert table.iloc[:, 1].map(catalog._normal).is_unique
    share = (table["split"] == "test").mean()
    assert 0.2 < share < 0.4


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("bbc-topic", "bbc"),
        ("subjectivity", "rotten-tomatoes"),
        ("film-sentiment", "rotten-tomatoes"),
        ("product-sentiment", "product-reviews"),
        ("headline-match", "bbc"),
    ],
)
def test_no_test_text_is_unlabelled(task, source):
    table = catalog.labelled(task)
    lines = set()
    for document in catalog.unlabelled(source):
        lines.update(catalog._normal(line) for line in [document.text, *document.text.split("\n")])
    test = table[table["split"] == "test"].iloc[:, 1].map(catalog._normal)
    assert not set(test) & lines
    if task != "subjectivity":  # where plot sentences are parts of lines
        train = table[table["split"] == "train"].iloc[:, 1].map(catalog._normal)
        assert set(train) <= lines


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("product-sentiment", "amazonReviewSnippets"),
        ("news-sentiment", "nytEditorialSnippets"),
        ("tweet-sentiment", "tweets"),
    ],
)
def test_a_rating_gives_the_label_and_a_document_stays_in_one_split(task, file):
    ratings, documents = {}, {}
    for number, rating, text in catalog._ratings(file):
        ratings.setdefault(text, set()).add(float(rating))
        documents.setdefault(text, set()).add(number.split("_")[0])
    table = catalog.labelled(task)
    signs = {"positive": 1, "negative": -1}
    assert all(any(signs[row.label] * one >= 0.5 for one in ratings[row.text]) for row in table.itertuples())
    splits = {}
    for row in table[table["text"].map(documents).map(len) == 1].itertuples():
        splits.setdefault(*documents[row.text], set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    sizes = table.groupby("split")["label"].value_counts().unstack()
    assert sizes.loc["train"].min() >= 2 * 16 and sizes.loc["test"].min() > 300


def test_editorials_and_tweets_are_in_no_unlabelled_text():
    texts = [text for task in ("news-sentiment", "tweet-sentiment") for text in catalog.labelled(task)["text"]]
    texts = {normal for normal in map(catalog._normal, texts) if len(normal.split()) > 5}
    assert len(texts) > 5000
    for source in catalog.CATALOG_SOURCES:
        for document in catalog.unlabelled(source):
            assert not texts & {catalog._normal(line) for line in document.text.split("\n")}


@pytest.mark.parametrize(
    "variants",
    [
        ("I love this feeling. :D", "I absolutely love this feeling! :D"),
        ("Cigar smell is absolutely disgusting. Gross gross gross", "Cigar smell is disgusting! Gross!"),
        ("Damn, running late sucks.", "Damn! running late absolutely sucks!"),
    ],
)
def test_tweets_made_out_of_one_another_stay_in_one_split(variants):
    table = catalog.labelled("tweet-sentiment").set_index("text")
    assert len({table.loc[text, "split"] for text in variants}) == 1


def test_topics_and_balance():
    topics = catalog.labelled("bbc-topic")
    assert set(topics["label"]) == {"business", "entertainment", "politics", "sport", "tech"}
    sizes = catalog.labelled("subjectivity").groupby("split")["label"].value_counts().unstack()
    assert (sizes["objective"] == sizes["subjective"]).all()


@pytest.mark.parametrize(
    ("task", "source"), [("reuters", "reuters"), ("newsgroups", "newsgroups"), ("newsgroups-topic", "newsgroups")]
)
def test_no_beginning_of_a_test_story_is_unlabelled(task, source):
    table = catalog.labelled(task)
    beginnings = {" ".join(document.text.split()[:80]) for document in catalog.unlabelled(source)}
    assert not set(table[table["split"] == "test"]["text"]) & beginnings


def test_a_headline_belongs_to_its_own_article_and_to_no_other():
    openings = {}
    for document in catalog.unlabelled("bbc"):
        headline, *lines = document.text.split("\n")
        openings.setdefault(headline, []).append(" ".join(" ".join(lines).split()))
    table = catalog.labelled("headline-match")
    table = table[table["split"] == "train"]
    own = [any(text.startswith(row.opening) for text in openings[row.headline]) for row in table.itertuples()]
    assert own == (table["label"] == "yes").tolist()
    assert table["label"].value_counts(normalize=True).between(0.49, 0.51).all()


def test_the_next_paragraph_is_the_one_that_the_label_names():
    articles = {}
    for document in catalog.unlabelled("bbc"):
        paragraphs = [" ".join(line.split()) for line in document.text.split("\n")[1:] if line.strip()]
        articles.setdefault(paragraphs[0], paragraphs)
    table = catalog.labelled("next-paragraph")
    assert table["label"].value_counts(normalize=True).between(0.24, 0.26).all()
    found = 0
    for row in table[table["split"] == "train"].itertuples():
        [opening] = [text for text in articles if text.startswith(row.opening)][:1]
        following = articles[opening][1]
        follows = [following.startswith(getattr(row, letter)) for letter in "abcd"]
        found += follows["ABCD".index(row.label)] and sum(follows) == 1
    assert found / (table["split"] == "train").sum() > 0.99


@pytest.mark.parametrize("read", [catalog.unlabelled, catalog.labelled])
def test_unknown_name_is_refused(read):
    with pytest.raises(UserError, match="The catalog has no"):
        read("bcc")
