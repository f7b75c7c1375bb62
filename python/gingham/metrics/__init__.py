"""Metrics that torchmetrics does not have, to the protocols' letter."""

from gingham.metrics.attention import AttentionMeter, AttentionScores
from gingham.metrics.boundary_iou import BoundaryMeter, BoundaryScores
from gingham.metrics.detection import DetectionMeter, DetectionScores
from gingham.metrics.embedding_purity import EmbeddingPurity
from gingham.metrics.few_shot import FewShotMeter, FewShotScores
from gingham.metrics.retrieval import RetrievalMeter, RetrievalScores
from gingham.metrics.segmentation import SegmentationMeter, SegmentationScores
from gingham.metrics.voc_detection import voc_average_precision

__all__ = [
    "AttentionMeter",
    "AttentionScores",
    "BoundaryMeter",
    "BoundaryScores",
    "DetectionMeter",
    "DetectionScores",
    "EmbeddingPurity",
    "FewShotMeter",
    "FewShotScores",
    "RetrievalMeter",
    "RetrievalScores",
    "SegmentationMeter",
    "SegmentationScores",
    "voc_average_precision",
]
