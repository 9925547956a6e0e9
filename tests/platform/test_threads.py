import os

from megatron_vlm.platform.threads import keep_tokenizers_in_one_thread


def test_the_package_is_told_in_the_variable_that_it_reads(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    keep_tokenizers_in_one_thread()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
