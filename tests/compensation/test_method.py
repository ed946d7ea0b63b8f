import pytest
from omegaconf import OmegaConf

from bnnft.ber import Independent
from bnnft.compensation import Method, as_method


def test_each_kind_does_what_it_says():
    does = {kind: (m := Method(kind)) and (m.scales, m.shifts, m.recalibrates) for kind in KINDS}
    assert does == {
        "thresholds": (True, False, False),
        "input_sum": (True, True, False),
        "recalibration": (False, False, True),
        "auto": (True, True, False),
    }
    both = Method(("input_sum", "recalibration"))
    assert (both.scales, both.shifts, both.recalibrates) == (False, True, True)


KINDS = ["thresholds", "input_sum", "recalibration", "auto"]


def test_a_kind_or_several_are_a_method():
    assert as_method("auto").kinds == Method().kinds == as_method(["auto"]).kinds == ("auto",)
    assert as_method(method := Method()) is method
    assert Method(gathered_at=0.1).gathered_at == Independent(0.1)


def test_a_config_hands_it_over_as_it_is():
    held = OmegaConf.create({}, flags={"allow_objects": True})
    held["method"] = method = Method("thresholds", samples=10)
    assert as_method(held["method"]) is method


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "magic"}, ValueError, "kind must be one of thresholds, input_sum, recalibration, auto, got 'magic'"),
        ({"kind": []}, TypeError, r"kind must be one or several of .*, got \[\]"),
        ({"kind": 3}, TypeError, "kind must be one or several of .*, got 3"),
        ({"samples": 1}, ValueError, "samples must be an integer >= 2, got 1"),
        ({"die": "any"}, ValueError, "die must be one of same, other, got 'any'"),
        ({"gathered_at": 2}, ValueError, r"rate must be a fraction in \[0, 1\], got 2"),
    ],
)
def test_bad_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        Method(**arguments)
