"""What goes wrong before or around the command that the oracle runs."""


class OracleError(Exception):
    """The oracle cannot be made, or its machine ended without a result; the text is one line that says what to do."""
