"""What two data sets share, and a run scored on the other's rows."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import transfer


def test_shared_rows_are_found_whatever_their_spelling():
    trained = ["It 's a Charming , caf\u00e9-lit journey .", "of the year", "one two three four five six", "the end"]
    tested = [
        "it's a charming, cafe-lit journey",  # the same sentence
        "we say: it's a charming cafe-lit journey, twice",  # holds it
        "two three four five",  # is part of one
        "it's the best film of the year",  # three words in common prove nothing
        "the end",  # short, but the whole row
        "something else",
    ]
    found = transfer.shared_rows(tested, trained)
    assert found["whole"].tolist() == [True, False, False, False, True, False]
    assert found["part"].tolist() == [True, True, False, False, False, False]
    assert found["within"].tolist() == [True, False, True, False, False, False]
