import msgspec
import pytest

from semcons_ray.data.losses import Reason, Tally
from semcons_ray.errors import DataError

LONG = Reason(words="with a long text", remedy="raise the.limit")
EMPTY = Reason(words="with no text", remedy="mend the.file")
THINNED = Reason(words="thinned out")


def tally(total: int, **counts: int) -> Tally:
    reasons = {"long": LONG, "empty": EMPTY, "thinned": THINNED}
    return Tally.of("the.file", "rows left out", total, {reasons[name]: count for name, count in counts.items()})


def test_what_is_left_out_by_design_is_listed_and_no_loss():
    one = tally(1000, thinned=800, empty=2, long=0)
    assert (one.lost, one.usable, one.share) == (2, 200, 0.01)
    assert str(one) == "the.file: 2 of 200 rows left out (2 with no text); by design 800 thinned out"
    assert [loss.words for loss in one.losses] == ["thinned out", "with no text"]
    assert str(tally(1000)) == "the.file: 0 of 1,000 rows left out"


def test_over_one_in_a_hundred_is_a_warning():
    assert not tally(1000, long=10).is_warning
    assert tally(1000, long=10, empty=1).is_warning
    assert not tally(1000, long=5, thinned=500).is_warning
    assert tally(1000, long=6, thinned=500).is_warning


def test_over_half_is_an_error_that_says_what_to_do_about_the_commonest_reason():
    tally(10, long=3, empty=2).check()
    with pytest.raises(DataError) as raised:
        tally(20, long=2, empty=4, thinned=10).check()
    assert str(raised.value) == (
        "the.file: 6 of 10 rows left out (4 with no text, 2 with a long text); by design 10 thinned out. "
        "That is over half: mend the.file"
    )


def test_a_tally_survives_a_file():
    one = tally(1000, thinned=800, empty=2)
    assert msgspec.json.decode(msgspec.json.encode(one), type=Tally) == one
