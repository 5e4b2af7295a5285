"""How narrowly comparisons of numbers hold: ``pytest --margins``.

Each comparison through ``pytest.approx``, ``torch.allclose`` and ``torch.testing.assert_close`` is
measured: the difference as a share of what is allowed; or, where a test demands that two numbers
differ, the other way round. Of each line of the tests the largest share is told in the end.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

TOLD = 0.1  # smaller shares are not

Approx = type(pytest.approx(1.0))  # of a number; sequences and mappings ask it for each
_tests = Path(__file__).parent
_widest: dict[str, float] = {}


def note(difference: float, allowed: float) -> None:
    """Keep a comparison that the line of a test which is running makes."""
    frame = sys._getframe(1)
    while frame and (
        not Path(frame.f_code.co_filename).is_relative_to(_tests)
        or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back  # type: ignore[assignment]
    if not frame or not allowed:
        return
    share = difference / allowed
    line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    _widest[line] = max(_widest.get(line, 0.0), min(share, 1 / share) if share else 0.0)


def _share_of(actual: Any, expected: Any, rtol: float, atol: float) -> None:
    import torch

    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape or not actual.numel():
        return
    actual, expected = actual.detach(), expected.detach().to(actual.dtype)
    allowed = atol + rtol * expected.abs()
    note(float(((actual - expected).abs() / allowed).nan_to_num().max()), 1.0)


@pytest.fixture(autouse=True, scope="session")
def measured() -> Iterator[None]:
    """Lets every comparison be noted before it is made."""
    import torch
    from torch.testing._comparison import default_tolerances

    equal, close, assert_close = Approx.__eq__, torch.allclose, torch.testing.assert_close

    def scalar(self: Any, actual: Any) -> bool:
        with suppress(TypeError, ValueError):  # not numbers
            note(abs(self.expected - actual), self.tolerance)
        return equal(self, actual)

    @functools.wraps(close)
    def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, **options: Any) -> bool:
        _share_of(a, b, rtol, atol)
        return close(a, b, rtol, atol, **options)

    @functools.wraps(assert_close)
    def asserted(a: Any, b: Any, *, rtol: Any = None, atol: Any = None, **options: Any) -> None:
        if isinstance(a, torch.Tensor):
            given = (rtol, atol) if rtol is not None else default_tolerances(a, b)
            _share_of(a, b, *given)
        assert_close(a, b, rtol=rtol, atol=atol, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Approx, "__eq__", scalar)
        patch.setattr(torch, "allclose", allclose)
        patch.setattr(torch.testing, "assert_close", asserted)
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The lines that leave least room, narrowest first."""
    terminalreporter.section("margins")
    for line, share in sorted(_widest.items(), key=lambda item: -item[1]):
        if share > TOLD:
            terminalreporter.write_line(f"{share:.2f} of what is allowed  tests/{line}")
