from megatron_vlm.evaluation.scores.exact_match import score


def test_exact_match_ignores_only_case_and_surrounding_blanks():
    assert score(" Red ", ["red"]) == 1.0
    assert score("a red", ["red"]) == 0.0


def test_any_of_several_answers_counts():
    assert score("blue", ["red", "blue"]) == 1.0
