"""Metrics that torchmetrics does not have, to the protocols' letter."""

from gingham.metrics.segmentation import SegmentationMeter, SegmentationScores

__all__ = ["SegmentationMeter", "SegmentationScores"]
