"""The runner: where results go."""

from __future__ import annotations

import json

from bench import run


def test_rows_of_other_processors_stay(tmp_path):
    path = tmp_path / "some.jsonl"
    run.write(path, [{"device": "A", "p50": 1}, {"device": "A", "p50": 2}])
    run.write(path, [{"device": "B", "p50": 3}])
    run.write(path, [{"device": "A", "p50": 4}])
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"device": "B", "p50": 3},
        {"device": "A", "p50": 4},
    ]


def test_commit_of_a_copy_without_history(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("HFLFNERV_COMMIT", raising=False)
    assert run.environment()["commit"] is None
    monkeypatch.setenv("HFLFNERV_COMMIT", "abc")
    assert run.environment()["commit"] == "abc"
    assert run.environment()["dirty"] is False
