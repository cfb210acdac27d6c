import pytest

from sigreg_lib._names import nearest


@pytest.mark.parametrize(
    ("name", "found"), [("wek", "weak"), ("strang", "strong"), ("weak", "weak"), (3, "weak")]
)
def test_the_nearest_known_name_is_given_whatever_the_distance(name, found):
    assert nearest(name, ("none", "weak", "strong")) == found


def test_nothing_is_given_where_nothing_is_near_or_known():
    assert nearest("wek", ("weak",), cutoff=0.5) == "weak"
    assert nearest("zzz", ("weak",), cutoff=0.5) is None
    assert nearest("weak", ()) is None


def test_known_names_may_be_numbers_or_the_keys_of_a_dictionary():
    assert nearest(31, {32: "a", 7: "b"}) == "32"
