"""What the tests of the operations share."""

from __future__ import annotations

import pytest

from hflfnerv._impl import Implementation
from hflfnerv.testing import implementations


@pytest.mark.parametrize(("required", "skipped"), [("", {"triton", "cuda", "cpp"}), ("cuda", {"cpp"})])
def test_what_is_required_is_not_skipped(required, skipped, monkeypatch):
    monkeypatch.setenv("HFLFNERV_REQUIRE", required)
    table = [Implementation(name, pytest.fail, lambda: "not here") for name in ("triton", "cuda", "cpp")]
    cases = implementations([*table, Implementation("reference", pytest.fail)])
    assert {case.id for case in cases if case.marks} == skipped
    assert [case.values for case in cases] == [
        ("triton", "cuda"),
        ("cuda", "cuda"),
        ("cpp", "cpu"),
        ("reference", "cpu"),
    ]
