"""banger: one command gives a developer, or a coding agent, a throw-away Linux machine."""

# A literal: importlib.metadata costs 41 ms on the command line's hot path (shared/LIBRARIES.md).
__version__ = "0.1.0"
