from megatron_vlm.cli.main import main
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES


def test_a_tokenizer_of_another_size_is_refused(place, tmp_path, capsys):
    write_random_run(tmp_path / "run", tiny_model(vocab_size=NUM_PIECES + 1), place / "tokenizer.model")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 78
    assert f"tokenizer has {NUM_PIECES} pieces, the model {NUM_PIECES + 1}" in capsys.readouterr().err
