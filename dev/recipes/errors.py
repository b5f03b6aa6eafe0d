"""The error of a recipe that its user can mend."""


class RecipeError(Exception):
    """One line that names the value, the limit and the remedy; shown without a traceback."""
