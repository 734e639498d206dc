"""Sockets down, results up: what the rest asks of the engine, native or its twin."""

__all__ = ["relays"]
