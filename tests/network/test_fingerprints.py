"""What two machines compare before they train together."""

import copy

import pytest
from tokenizers.normalizers import Lowercase

from hf_devft.network.fingerprints import hash_of_tokenizer


def test_the_same_tokenizer_has_the_same_hash(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert hash_of_tokenizer(tokenizer) == hash_of_tokenizer(type(tokenizer).from_pretrained(tmp_path))
    assert hash_of_tokenizer(None) == "", "a trainer may have none"


@pytest.mark.parametrize("change", ["template", "token", "case"])
def test_another_tokenizer_has_another_hash(tokenizer, change):
    other = copy.deepcopy(tokenizer)
    if change == "template":
        other.chat_template = "{{ messages }}"
    elif change == "token":
        other.add_tokens("<new>")
    else:
        other.backend_tokenizer.normalizer = Lowercase()
    assert hash_of_tokenizer(other) != hash_of_tokenizer(tokenizer)
