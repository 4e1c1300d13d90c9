"""Drags are read, and said as they are read."""

import pytest

from retour.editors._drags import Drag, parse_drags
from retour.errors import RetourError


def test_drags_are_read_and_said():
    text = "12,40>44,40; 3.5,0>0,7*1.5 ;1,2>3,4*2,0.5"
    drags = parse_drags(text)
    assert drags[0] == Drag((12, 40), (44, 40))
    assert drags[1].scale == (1.5, 1.5) and drags[2].scale == (2, 0.5)
    assert parse_drags("; ".join(map(str, drags))) == drags
    assert parse_drags("1,2>3,4*.7") == (Drag((1, 2), (3, 4), (0.7, 0.7)),)
    assert parse_drags("  ") == ()
    for bad in ("1,2", "1,2>3", "a,b>c,d", "1,2>3,4*", "1,.>3,4", "1.2.3,4>5,6"):
        with pytest.raises(RetourError, match="write x,y>x,y"):
            parse_drags(bad)
