class StructuredOutputsParams:
    """Imported by TRL, used by nobody here."""
