"""The performance model: what DWDP costs and gains, computed without a GPU.

``demand`` is light enough for the hot runtime's set-up; everything else is for planning. The package
depends on ``dwdp.config`` and ``dwdp.placement`` alone.
"""
