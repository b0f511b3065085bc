"""Win accuracy back after surgery, without labels or with them."""

from convpare.recovery.batch_norm import recalibrate_
from convpare.recovery.calibrate import Recovered, RecoverOptions, recover, recover_with, tuned
from convpare.recovery.least_squares import Fitted, LeastSquares, compensate_
from convpare.recovery.training import TrainOptions
from convpare.recovery.tuning import TUNINGS, Tuned, TuneOptions, tune

__all__ = [
    "TUNINGS", "Fitted", "LeastSquares", "RecoverOptions", "Recovered", "TrainOptions", "TuneOptions", "Tuned",
    "compensate_", "recalibrate_", "recover", "recover_with", "tune", "tuned",
]  # fmt: skip
