"""Base of the recipe models: frozen, strict about keys, documented field by field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken rule: the field below the model that states it, its value, and sentences."""

    field: str
    value: object
    wrong: str
    advice: tuple[str, ...] = ()


class Faults(ValueError):
    """Raised by our rules inside pydantic: all faults of a model."""

    def __init__(self, *faults: Fault) -> None:
        """Keep the faults; the loader turns them into messages."""
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """Return the faults, one a line, for those who build models in Python."""
        return "\n".join(
            " ".join([f"{f.field} = {f.value!r}: {f.wrong}.", *f.advice]) for f in self.faults
        )


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """Metadata of a field: what it accepts, where type and bounds do not say it."""

    text: str


def raise_if(*faults: Fault | None) -> None:
    """Raise Faults if any rule found one."""
    # All faults at once: pydantic stops a validator at the first exception.
    broken = [fault for fault in faults if fault is not None]
    if broken:
        raise Faults(*broken)


def no_bool(value: Any) -> Any:
    """Return `value`; refuse booleans, which Python and pydantic count as 0 and 1."""
    # YAML reads `yes` and `on` as booleans, and `steps: yes` would otherwise train one step.
    if isinstance(value, bool):
        raise Faults(Fault("", value, "not a number"))
    return value


# user:password@ in front of a host, and parameters of signed URLs.
_SECRET_USER = re.compile(r"(?<=://)[^/@]*:[^/@]*(?=@)")
# Signed URLs name these parameters in several ways (X-Amz-Signature, X-Amz-Security-Token).
_SECRET_WORDS = "secret|token|password|signature|access_?key"
_SECRET_QUERY = re.compile(rf"(?i)([?&][\w.-]*(?:{_SECRET_WORDS})[\w.-]*)=[^&]+")


def no_secret(value: str) -> str:
    """Return a path or URL that holds no password: runs keep their recipe, reports show it."""
    if "://" not in value:
        return value
    shown = _SECRET_QUERY.sub(r"\1=...", _SECRET_USER.sub("...", value))
    # Redacted as reports would show it; a difference means that there was something to redact.
    if shown != value:
        wrong = "a recipe is no place for a password: runs keep it and pass it on"
        advice = "Give it by the environment or the files that the storage's own tools read"
        # The message quotes the redacted form, since messages end up in logs.
        raise Faults(Fault("", shown, wrong, (advice,)))
    return value


PathOrUrl = Annotated[str, AfterValidator(no_secret)]
Integer = Annotated[int, BeforeValidator(no_bool)]
Number = Annotated[float, BeforeValidator(no_bool)]


def default_tag(key: str, tag: str) -> BeforeValidator:
    """Return a validator that reads a mapping without `key` as one of kind `tag`."""

    def fill(value: Any) -> Any:
        # A discriminated union requires its tag; recipes may leave out the default one.
        return {key: tag, **value} if isinstance(value, dict) and key not in value else value

    return BeforeValidator(fill)


class RecipeModel(BaseModel):
    """A frozen recipe node; unknown keys are errors and docstrings become schema text."""

    model_config = ConfigDict(
        # A misspelled field must not become a silent default.
        extra="forbid",
        frozen=True,
        # The docstrings below fields are the text of the schema, of `raymix init` and of the
        # reference.
        use_attribute_docstrings=True,
        # Defaults that break a rule would otherwise be found by the first user.
        validate_default=True,
        # Neither compares usefully with a bound: `nan > 0` is False without an error.
        allow_inf_nan=False,
    )
