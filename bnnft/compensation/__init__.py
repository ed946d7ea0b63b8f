"""Give accuracy back without retraining: the mean of what errors do to a sum is known, and taken out of it."""

from bnnft.compensation.compensated import compensated
from bnnft.compensation.method import Method, as_method
from bnnft.compensation.permanent import compensate

__all__ = ["Method", "as_method", "compensate", "compensated"]
