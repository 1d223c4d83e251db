"""What long work says where stderr is no terminal, and where it is one."""

from itertools import count

import pytest

from model_patch import progress


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every 4 seconds a step is done."""
    clock = count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("quantize") as step:
        for done in range(1, 9):
            step(done, 8, f"layer {done}")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "quantize: 3/8 layer 3"
    assert 1 < len(lines) < 8


def test_what_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("quantize") as step:
        step(8, 8, "the last layer")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.progress_bar("quantize") as step:
        step(3, 8, "layer 3")
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/8" in err
