"""What every part of a request body has in common: how strictly it is read, and how our own findings are told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """Strict, because `"1"` is not 1; errors of lists stop at the first item, so that a bad body costs one error."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def fault(code: str, message: str, path: str = "") -> PydanticCustomError:
    """A finding of our own validators; `path` is where, below the field that is validated."""
    return PydanticCustomError(code, "{text}", {"text": message, "path": path})
