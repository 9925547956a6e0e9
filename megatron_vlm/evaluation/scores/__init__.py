"""Scores of answers, one file each: `score(prediction, answers) -> float`, from 0 (wrong) to 1 (right)."""
