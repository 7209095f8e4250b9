"""The terminal: words in, text out. Light to import; each verb has a module of its own."""
