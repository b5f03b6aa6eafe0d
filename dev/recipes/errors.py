"""The exception for errors of a recipe that the user can fix."""


class RecipeError(Exception):
    """An error that is shown as one line, without a traceback. The message names the value, the limit and the
    remedy."""
