"""How long explanations take with this package, and with what could be used in its place."""
