"""The one exception that the command shows as a line instead of a traceback."""


class Refused(Exception):
    """Something the user gave that cannot work, said in one line with a remedy."""
