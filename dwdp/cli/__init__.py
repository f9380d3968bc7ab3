"""The ``dwdp`` command.

``main.py`` is its entry point; ``options.py`` and ``display.py`` help; the rest are one command each.
"""
