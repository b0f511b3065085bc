"""Win accuracy back after surgery, without labels."""

from convpare.recovery.batch_norm import recalibrate_
from convpare.recovery.calibrate import Recovered, RecoverOptions, recover, recover_with
from convpare.recovery.least_squares import Fitted, LeastSquares, compensate_

__all__ = [
    "Fitted", "LeastSquares", "RecoverOptions", "Recovered", "compensate_", "recalibrate_", "recover", "recover_with",
]  # fmt: skip
