"""The ``dwdp`` command: ``main.py`` is its entry point, ``options.py`` shared, the rest one command each."""
