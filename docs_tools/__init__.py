"""Tools that build the documentation; they are not part of the package and stay outside `docs/`.

`execute` takes a Markdown text and gives it back with the outputs of its Python blocks. It knows
nothing of MkDocs: `mkdocs_hook` is the only module that does.
"""
