"""What stops a recipe and can be mended by its user."""


class RecipeError(Exception):
    """One line that names the value, the limit and the remedy; shown without a traceback."""
