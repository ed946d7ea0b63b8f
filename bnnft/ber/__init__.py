"""How stored bits go wrong: error models, and the random bits behind them.

An error model is anything with ``flips(weight, key) -> sorted flat indices of the stored bits that read wrong``;
stored bit 1 is weight +1.
"""

from bnnft.ber.error_model import ErrorModel, checked_rate
from bnnft.ber.independent import Independent, as_error_model
from bnnft.ber.random_bits import Key

__all__ = ["ErrorModel", "Independent", "Key", "as_error_model", "checked_rate"]
