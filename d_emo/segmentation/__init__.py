"""Segmenters on EMO backbones: networks, data, measures and pictures."""
