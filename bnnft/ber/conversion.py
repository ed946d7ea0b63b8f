"""Error models out of what callers and configs give."""

from inspect import signature
from typing import Any

from bnnft.ber.error_model import ErrorModel
from bnnft.ber.independent import Independent


def as_error_model(value: float | ErrorModel) -> ErrorModel:
    """Return an error model as it is, and a bare rate as independent flips at this rate.

    Raises:
        TypeError: neither an error model nor a number.
        ValueError: a number outside [0, 1].

    Example:
        >>> as_error_model(0.1)
        Independent(rate=0.1)
    """
    model = unwrapped(value)
    if isinstance(model, ErrorModel):
        return model
    try:
        return Independent(model)
    except TypeError as error:
        raise TypeError(f"{error}; errors of another kind must be of a subclass of bnnft.ber.ErrorModel") from None


def unwrapped(value: Any) -> Any:
    """Return an error model that a config took apart as it was, and anything else as it is.

    Hydra puts what it built for a list or a mapping into containers of OmegaConf. They take every dataclass for a
    config, and keep of an error model its class and its parameters only.
    """
    kind = getattr(getattr(value, "_metadata", None), "object_type", None)
    if not (isinstance(kind, type) and issubclass(kind, ErrorModel)):
        return value
    return kind(**{name: value[name] for name in signature(kind).parameters})
