"""Numbers, durations and errors as the console prints them."""

from __future__ import annotations


def short(number: float) -> str:
    """Return a number in three digits with k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}T"


def clock(seconds: float) -> str:
    """Return seconds as 12 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def one_line(error: Exception) -> str:
    """Return the message of another library's error in one line of 400 characters at most."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    message = " ".join(lines)[:400]
    if isinstance(error, ArithmeticError | LookupError | AttributeError):
        # Their messages mean little without the type: a KeyError's is the bare key.
        return f"{type(error).__name__}: {message}"
    return message or type(error).__name__
