import pytest

from sigreg_lib._names import FEW, suggest

LOSSES = ("none", "weak", "strong")


@pytest.mark.parametrize(("name", "near"), [("wek", "weak"), ("strang", "strong")])
def test_the_nearest_name_is_asked_for_before_all_of_a_few(name, near):
    assert suggest(name, LOSSES) == f"did you mean {near!r}? known: none, weak, strong"


@pytest.mark.parametrize("name", ["foo", 64, ""])
def test_no_name_is_proposed_that_has_nothing_to_do_with_the_given_one(name):
    assert suggest(name, LOSSES) == "known: none, weak, strong"


def test_many_names_are_listed_only_where_none_is_near():
    many = [f"layer{i}.weight" for i in range(FEW + 1)]
    assert suggest("layer7.weigth", many) == "did you mean 'layer7.weight'?"
    assert suggest("zzz", many) == f"known: {', '.join(many)}"
    assert suggest("zzz", many, listed=["layer*.weight"]) == "known: layer*.weight"
    assert suggest("layer7.weigth", many, listed=["layer*.weight"]).endswith("*.weight")


def test_known_names_may_be_numbers_or_the_keys_of_a_dictionary():
    assert suggest(321, {322: "a", 7: "b"}) == "did you mean '322'? known: 322, 7"
