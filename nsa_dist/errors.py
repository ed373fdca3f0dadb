"""The error that the command line tells in one line. Imports nothing, so that commands need no more than they use."""


class ConfigError(ValueError):
    """Bad input: one line that names the thing, its value and what is allowed."""

    bad_input = True  # False in what is told in one line too, but is no fault of the input
