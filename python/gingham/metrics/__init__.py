"""Metrics that torchmetrics does not have, to the protocols' letter."""

from gingham.metrics.boundary_iou import BoundaryMeter, BoundaryScores
from gingham.metrics.embedding_purity import EmbeddingPurity
from gingham.metrics.segmentation import SegmentationMeter, SegmentationScores

__all__ = ["BoundaryMeter", "BoundaryScores", "EmbeddingPurity", "SegmentationMeter", "SegmentationScores"]
