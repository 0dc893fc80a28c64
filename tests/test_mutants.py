"""The deliberate faults of `make mutants` have a place in the code, and tests that exist."""

import pytest

from tests.mutants import MUTANTS, ROOT, mutate


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.file)
def test_a_fault_changes_the_code_and_names_tests_that_exist(mutant):
    text = (ROOT / "upreid_ray" / mutant.file).read_text()

    assert mutate(text, mutant) != text
    for test in mutant.tests:
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        assert f"def {function}(" in (ROOT / "tests" / file).read_text() or not name
