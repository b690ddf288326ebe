"""The one error for numbers that training must not learn from."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; raised before the optimizer's step, so that the weights are still good."""
