"""Inference engines that dwdp extends."""
