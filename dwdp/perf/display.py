"""Figures as text, the same on the terminal and on pages."""

from __future__ import annotations

import math


def figure_text(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def error_text(error: float) -> str:
    """A relative error in percent."""
    if math.isinf(error):
        return "not 0"
    return "0 %" if abs(error) < 0.0005 else f"{100 * error:+.1f} %"
