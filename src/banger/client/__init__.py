"""The daemon seen from the command line: a socket, a start, and one method per route."""
