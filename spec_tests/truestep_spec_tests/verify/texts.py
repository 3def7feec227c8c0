"""Texts of implementations, which may hold anything."""


def encodable(text: str) -> str:
    """The same with escapes for what no encoding has: halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
