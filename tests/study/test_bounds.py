"""What ends a stage of a study."""

import pytest

from transfermium import InputError
from transfermium.study.bounds import both, bound_of, fair, in_words, plain, seconds_of


@pytest.mark.parametrize(
    ("text", "bound", "words"),
    [
        ("300steps", {"steps": 300}, "300 steps"),
        ("30s", {"processor_time": "30s"}, "30s of processor time"),
        ("20TFLOP", {"flop": "20TFLOP"}, "20TFLOP"),
    ],
)
def test_texts_stand_for_options(text, bound, words):
    assert bound_of(text) == bound
    assert in_words(bound) == words


@pytest.mark.parametrize(
    "text",
    ["0steps", "many steps", "soon", "many TFLOP", "3XFLOP", "FLOP", "1..2GFLOP", "0TFLOP", "-5s", "nan", "20tflop"],
)
def test_texts_that_stand_for_nothing(text):
    with pytest.raises(InputError, match=text.replace(".", r"\.")):
        bound_of(text)


def test_two_stages_in_one():
    assert both(bound_of("300steps"), bound_of("20steps")) == {"steps": 320}
    assert seconds_of(both(bound_of("2min"), bound_of("30s"))) == 150
    assert plain(both(bound_of("20TFLOP"), bound_of("500 GFLOPs"))) == "2.05e+13FLOP"
    with pytest.raises(InputError, match="not 20TFLOP and 30s of processor time"):
        both(bound_of("20TFLOP"), bound_of("30s"))


def test_steps_are_no_equal_compute():
    assert fair("20TFLOP") == {"flop": "20TFLOP"}
    with pytest.raises(InputError, match="cost differently"):
        fair("300steps")
