"""How stored bits go wrong: error models, and the random bits behind them.

An error model subclasses :class:`ErrorModel`, whose one abstract method is ``flips(weight, key)``: it returns the
sorted flat indices of the stored bits that read wrong. Stored bit 1 is weight +1.
"""

from bnnft.ber.asymmetric import Asymmetric
from bnnft.ber.bram28 import Bram28
from bnnft.ber.checks import checked_bit_rates, checked_choice, checked_flips, checked_rate
from bnnft.ber.chip import Chip
from bnnft.ber.clustered import Clustered
from bnnft.ber.conversion import as_error_model
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.independent import Independent
from bnnft.ber.per_layer import PerLayer
from bnnft.ber.protected import Protected
from bnnft.ber.random_bits import Key
from bnnft.ber.rram import Rram
from bnnft.ber.schedule import Constant, Cosine, Curriculum, Linear, Schedule, Steps, Uniform, checked_schedule
from bnnft.ber.scrambled import Scrambled
from bnnft.ber.secded import Secded
from bnnft.ber.sequence import Sequence
from bnnft.ber.sram14 import Sram14
from bnnft.ber.sram65 import Sram65

__all__ = [
    "Asymmetric",
    "Bram28",
    "Chip",
    "Clustered",
    "Constant",
    "Cosine",
    "Curriculum",
    "ErrorModel",
    "Independent",
    "Key",
    "Linear",
    "PerLayer",
    "Protected",
    "Rram",
    "Schedule",
    "Scrambled",
    "Secded",
    "Sequence",
    "Sram14",
    "Sram65",
    "Steps",
    "Uniform",
    "as_error_model",
    "checked_bit_rates",
    "checked_choice",
    "checked_flips",
    "checked_rate",
    "checked_schedule",
]
