"""The exceptions that rosa_fx raises for input it cannot accept."""


class RosaError(ValueError):
    """Bad input to rosa_fx. The message names the weight or field, the value found and the remedy."""


class NonFiniteError(RosaError):
    """A loss or a gradient that is NaN or infinite."""


class EagerTrainingWarning(UserWarning):
    """A transformed model trains without `torch.compile`, which is right but slower. Given once in a process."""
