"""The engine in Python: the same interface and laws as the native one, slower."""
