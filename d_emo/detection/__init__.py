"""Detectors of the EMOv1 and EMOv2 papers, on torchvision's detection package."""
