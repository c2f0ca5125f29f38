"""Every form in which servers say how long they want to be left alone; the longest counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.endpoints.retry_after import LONGEST, retry_after

NOW = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "Sun, 09 Sep 2001 01:46:50 GMT"}, 10.0),
        ({"retry-after": "Sun, 09 Sep 2001 01:46:30 GMT"}, 0.0),
        ({"retry-after": "Sun, 09 Sep 2001 02:00:05 GMT", "date": "Sun, 09 Sep 2001 02:00:00 GMT"}, 5.0),
        ({"retry-after-ms": "350"}, 0.35),
        ({"x-ratelimit-reset-requests": "1m30s"}, 90.0),
        ({"x-ratelimit-reset-tokens": "350ms"}, 0.35),
        ({"x-ratelimit-reset-tokens": "1h2m3.5s"}, 3600.0),
        ({"x-ratelimit-reset-requests": "2.5"}, 2.5),
        ({"x-ratelimit-reset": "1000000012"}, 12.0),
        ({"x-ratelimit-reset": "1000000012000"}, 12.0),
        ({"x-ratelimit-reset": "2001-09-09T01:46:42Z"}, 2.0),
        ({"retry-after": "2", "retry-after-ms": "1500", "x-ratelimit-reset-requests": "3h"}, 2.0),
        ({"x-ratelimit-reset-requests": "2h24m", "x-ratelimit-reset-tokens": "400ms"}, 0.4),
        (
            {
                "x-ratelimit-reset-requests": "90s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "400ms",
                "x-ratelimit-remaining-tokens": "9000",
            },
            90.0,
        ),
        ({"retry-after": "86400"}, LONGEST),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan", "retry-after-ms": "inf", "x-ratelimit-reset": "soon"}, None),
        ({"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}, None),
    ],
)
def test_all_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == (None if seconds is None else pytest.approx(seconds))


@given(
    st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset-tokens", "date"]),
    st.text(alphabet="0123456789.:-+ smhdTZSun,GMep²", max_size=30),
)
def test_no_text_breaks_it(name: str, value: str) -> None:
    seconds = retry_after({name: value, "retry-after-ms": "1"} if name == "date" else {name: value}, NOW)
    assert seconds is None or 0 <= seconds <= LONGEST
