import typing

import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.config.prepare import ImageRules, TemplateName
from megatron_vlm.data.text.templates import TEMPLATES


def test_smallest_file_above_the_largest_is_refused():
    with pytest.raises(UsageError, match="--min-image-bytes 9 is above --max-image-bytes 6"):
        ImageRules(min_bytes=9, max_bytes=6)


def test_template_names_are_those_of_the_templates():
    assert set(typing.get_args(TemplateName)) == set(TEMPLATES)
