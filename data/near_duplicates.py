"""How many held-out questions stand, almost as they are, among the training questions."""

from sklearn.feature_extraction.text import TfidfVectorizer

from data.sources import prompt_of, read_rows

ALIKE = 0.9  # cosine of TF-IDF vectors of character n-grams


def near_duplicates(tasks: tuple[str, ...], source: str) -> dict[str, dict]:
    """{task: {"questions", "same", "near"}}: different held-out questions, and how many of them the training half has
    word for word, or nearly so (the same included)."""
    counts = {}
    for task in tasks:
        trained, held_out = (
            list(
                dict.fromkeys(
                    " ".join(filter(None, prompt_of(row))).lower().strip() for row in read_rows(task, split, source)
                )
            )
            for split in ("train", "test")
        )
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit(trained + held_out)
        likeness = vectorizer.transform(held_out) @ vectorizer.transform(trained).T
        nearest = likeness.max(axis=1).toarray()[:, 0]
        counts[task] = {
            "questions": len(held_out),
            "same": len(set(held_out) & set(trained)),
            "near": int((nearest >= ALIKE).sum()),
        }
    return counts
