"""How answers went on before is counted by their whole beginning, and by their last tokens where that is new."""

from __future__ import annotations

from msgrpo_lab.engines.hf.free import CONTEXT, LIKELY, Likely


def test_the_whole_beginning_goes_before_its_last_tokens() -> None:
    likely = Likely()
    likely.count((1, 2, 3, 4), 5, times=3)
    likely.count((9, 2, 3, 4), 6, times=1)
    assert likely.after((1, 2, 3, 4)) == [(5, 1.0)]
    assert sorted(likely.after((7, 2, 3, 4))) == [(5, 0.75), (6, 0.25)]
    assert likely.after((3, 4)) == []
    assert CONTEXT == 3


def test_what_is_rare_is_left_out() -> None:
    likely = Likely()
    likely.count((1,), 2, times=99)
    likely.count((1,), 3, times=1)
    assert LIKELY > 0.01
    assert likely.after((1,)) == [(2, 0.99)]
