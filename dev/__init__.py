"""Tools of development; not part of the packed release."""
