"""The one exception type that rosa_fx raises for input it cannot accept."""


class RosaError(ValueError):
    """Bad input to rosa_fx. The message names the weight or field, the value found and the remedy."""
