"""VQA accuracy: agreement with the answers of several people, with the known quirks of the reference code."""

import re
from collections.abc import Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# The reference passes re.UNICODE where re.sub takes the count, so it removes this many periods and no more.
_MAX_PERIODS = 32
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspellings() -> dict[str, str]:
    """Return each contraction spelled with one apostrophe missing, mapped to its correct spelling."""
    spelled = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return {**spelled, "somebody'd": "somebodyd"}  # as in the reference


_SPELLING = _misspellings()


def normalise_answer(answer: str) -> str:
    """Return an answer in the form VQA compares: lower case, no articles or punctuation, digits for number words.

    Source: VQA evaluation, processed as in facebookresearch/mmf, pythia/tasks/processors.py, EvalAIAnswerProcessor.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).split()]
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    has_thousands = _THOUSANDS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_outside_words = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_outside_words or has_thousands else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def score(prediction: str, answers: Sequence[str]) -> float:
    """Return how well the prediction agrees with people's answers, from 0 to 1.

    This is the mean over all people of min(1, matches among the other people / 3), which is the official measure for
    ten answers. With fewer than four answers, agreement with all others counts as 1; a single answer must be equal.

    Args:
        prediction: the model's answer.
        answers: one answer per person, at least one.
    """
    wanted, given = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    if len(given) == 1:
        return float(wanted == given[0])
    enough = min(3, len(given) - 1)
    matches = given.count(wanted)
    scores = [min(1.0, (matches - (answer == wanted)) / enough) for answer in given]
    return sum(scores) / len(scores)
