"""Names that no dense checkpoint has."""

from collections.abc import Sequence

# Parts of the names of parameters that only a sparse model has.
NEW_PARTS = ('.predictors.', '.predictor.', '.fast_path.')


def is_new(name: str, parts: Sequence[str] = NEW_PARTS) -> bool:
    """Return whether a parameter of this name is in one of the parts that are new."""
    return any(part in f'.{name}' for part in parts)
