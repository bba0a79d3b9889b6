"""Any value for any key of params.yaml: accepted, or refused in one plain line with the key."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.runtime.errors import UserError
from tests.test_params import FILE, SECRET, load_changed

pytestmark = pytest.mark.slow
ODD = [
    *("", " ", "auto", "5", "nan", "null", "..", "a" * 10_000, "a\0b", "a\nb", "\x1b[31m"),
    *("\u0663", "\u202e", "\ud800", f"http://user:{SECRET}@host", f"s3://{SECRET}@bins"),
    *(-1, 0, 2**31, 2**64, 10**400, 0.0, 1e-320, 1e300, math.inf, math.nan, None, True, b"bytes"),
    *([], {}, [0.5] * 3, [math.nan], {1: 2}, {"a": {1, 2}}, {"model_type": "vit"}, [{SECRET: 1}]),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD)


def keys_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and key != "config":
            yield from keys_of(value, f"{prefix}{key}.")


def check(key: str, value: Any) -> None:
    try:
        loaded: Any = load_changed({key: value}).model_dump()
    except UserError as error:
        text = str(error)
        assert all(part in text for part in key.split("."))
        assert text.isprintable()
        assert SECRET not in text
        return
    for name in key.split("."):
        loaded = loaded[name]
    assert loaded == value


@pytest.mark.parametrize("key", list(keys_of(FILE)))
def test_an_odd_value_is_accepted_or_refused_with_its_key(key: str) -> None:
    for value in ODD:
        check(key, value)


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(list(keys_of(FILE))), SCALARS | st.lists(SCALARS, max_size=4))
def test_any_value_is_accepted_or_refused_with_its_key(key: str, value: Any) -> None:
    check(key, value)
