"""Visual dialogs of M3IT, which are published as one text.

M3IT is published as JSON lines, and converted to parquet, with `instruction`, `inputs`, `outputs` and a list
`image_base64_str`; `instruction_records` reads them. The image descriptions and all earlier questions and answers of
a visual dialog are in `inputs`, which the VILA code takes apart into turns.

Source: M3IT, arXiv:2306.04387; VILA, llava/data/dataset.py, LazyVFlanDataset.
"""

_DIALOG_MARK = "Image Descriptions"
_QUESTION, _ANSWER = "\nQuestion: ", "\nAnswer: "


def split_dialog(question: str, answer: str) -> list[tuple[str, str]]:
    r"""Return the questions and answers of a visual dialog, or the given question and answer of any other text.

    The text before the first question (the instruction and the image descriptions) stays in front of it.

    Example: `"Look. Image Descriptions: a cat\nQuestion: big?\nAnswer: no\nQuestion: red?"` with the answer `"yes"`
    becomes `[("Look. Image Descriptions: a cat\nbig?", "no"), ("red?", "yes")]`.
    """
    head, *rounds = question.split(_QUESTION)
    if _DIALOG_MARK not in head or not rounds:
        return [(question, answer)]
    turns = [one.split(_ANSWER) for one in rounds]
    if any(len(turn) != 2 for turn in turns[:-1]) or len(turns[-1]) > 2 or turns[-1][1:] not in ([], [""]):
        return [(question, answer)]
    exchanges = [(asked, answered) for asked, answered in turns[:-1]]
    exchanges.append((turns[-1][0], answer))
    return [(f"{head}\n{exchanges[0][0]}", exchanges[0][1]), *exchanges[1:]]
