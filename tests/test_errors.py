import numpy
import pytest
import torch

from retour.errors import RetourError, check_finite, check_range, check_seed, quote, unknown


def test_unknown_names_the_nearest_choice():
    error = unknown("inverter", "dirct", ["renoise", "direct", "ddim"])
    assert isinstance(error, RetourError)
    assert str(error) == (
        "unknown inverter 'dirct': did you mean 'direct'? Choices: ddim, direct, renoise."
    )


def test_unknown_without_a_near_choice_lists_them_all():
    assert str(unknown("editor", "zzz", ["p2p"])) == "unknown editor 'zzz': Choices: p2p."
    assert "there are none" in str(unknown("editor", "zzz", []))


def test_what_has_the_name_elsewhere_is_said():
    error = unknown("editor", "direct", ["p2p"], "an inverter")
    assert str(error) == "unknown editor 'direct': it is an inverter. Choices: p2p."


def test_quotes_are_short():
    assert quote("a cat") == "'a cat'"
    assert quote("one " + "word " * 100 + "end", 25) == "'one word w ... d word end'"


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, numpy.int64(7)])
def test_seeds_pass_as_whole_numbers(seed):
    torch.Generator().manual_seed(check_seed("seed", seed))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30, 2.0, "7", None, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(RetourError, match="seed is .*: choose a whole number"):
        check_seed("seed", seed)


@pytest.mark.parametrize("make", [numpy.asarray, torch.tensor])
def test_finite_values_pass_and_others_are_counted(make):
    check_finite(make([0.0, 1.0]), "the latents")
    check_finite(make([0, 1]), "the labels")
    with pytest.raises(RetourError, match="the latents hold 2 NaN or infinite of 3 values: try"):
        check_finite(make([0.0, float("nan"), float("inf")]), "the latents", "try float32")


@pytest.mark.parametrize("value", [0, 0.5, 1, numpy.float32(0.25), torch.tensor(0.5)])
def test_values_in_range_pass(value):
    check_range("strength", value, 0, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "1", None, True, [1]])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(RetourError, match="strength is .*: choose a number from 0 to 1"):
        check_range("strength", value, 0, 1)


@pytest.mark.parametrize(
    ("limits", "value", "said"),
    [
        ({"low": 1}, 0, "a number of at least 1"),
        ({"high": 5}, 6, "a number of at most 5"),
        ({}, "x", "choose a number"),
    ],
)
def test_open_ranges(limits, value, said):
    with pytest.raises(RetourError, match=said):
        check_range("steps", value, **limits)
