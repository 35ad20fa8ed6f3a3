"""A sample of what `hostile_files.py` does, and some that were found by it and by hand."""

import pytest
from hostile_files import GOOD, Specimen, mutations


SAMPLE = 100  # a minute; `python tests/hostile_files.py` does more


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    return Specimen(tmp_path_factory.mktemp("specimen"))


def test_each_ends_in_a_clear_error_or_in_what_the_file_says(specimen):
    bad = []
    for mutation in mutations(SAMPLE):
        kind, how = specimen.outcome(mutation)
        if kind not in GOOD[mutation.forged]:
            bad.append(f"{kind}: {how}")
    assert not bad, "\n".join(bad)
