"""How re-identification is evaluated, whatever the network: features of all queries and of the gallery, then ranks.

feature of an image = embed(image), or embed(image) + embed(mirrored image)
feature of a tracklet = mean over its clips
scores: CMC and mean average precision, see gingham.metrics.retrieval
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.methods.network_recipe import NetworkRecipe
from gingham.metrics.retrieval import AveragePrecision, RetrievalMeter, RetrievalScores

#: The ranks of the CMC that are logged.
LOGGED_RANKS = (1, 5, 10, 20)

_SHOWN_QUERIES = 8


class ReidRecipe(NetworkRecipe):
    """Trains a network on persons; what its steps are and what of it is a feature, subclasses say.

    After ``val_`` or ``test_`` it logs ``map``, ``rank1``, ``rank5``, ``rank10``, ``rank20``, ``minp`` and ``queries``,
    how many were scored; with re-ranking also ``reranked_map``, ``reranked_rank1`` and so on, which are never to be
    compared with the first. The whole scores of a split are kept in `scores`.

    Args:
        network_class: as in `gingham.methods.network_recipe.NetworkRecipe`.
        network: as there.
        flip_test: add to the features of an image or a clip those of its mirror image.
        normalize: scale features to length 1.
        metric: of the distance, "euclidean" or "cosine".
        ap: how precisions become an average precision, see `gingham.metrics.retrieval.rank`.
        rerank: options of `gingham.ops.k_reciprocal_rerank` for scores after re-ranking; None for no such scores.
        clips_at_once: clips of tracklets that are evaluated at a time, 1 or more.
        options: as in `gingham.methods.network_recipe.NetworkRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    #: What the best checkpoint is chosen by.
    monitor = "val_map"

    def __init__(
        self,
        network_class: type[nn.Module],
        network: dict[str, Any],
        *,
        flip_test: bool = False,
        normalize: bool = False,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        ap: AveragePrecision = "standard",
        rerank: dict[str, Any] | None = None,
        clips_at_once: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(network_class, network, **options)
        if clips_at_once < 1:
            raise ValueError(f"clips_at_once must be 1 or more, got {clips_at_once}")
        self.flip_test, self.normalize, self.clips_at_once = flip_test, normalize, clips_at_once
        meter: dict[str, Any] = {"metric": metric, "ap": ap, "rerank": rerank, "shown": _SHOWN_QUERIES}
        #: Of "val" and "test".
        self.meters = nn.ModuleDict({split: RetrievalMeter(**meter) for split in ("val", "test")})
        #: Of "val" and "test", from the last evaluation.
        self.scores: dict[str, RetrievalScores] = {}

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """The features that are compared.

        Args:
            pixels: normalised images [n, 3, H, W], or clips [n, T, 3, H, W].

        Returns:
            [n, D].
        """

    def describe(self) -> str:
        """What the scores depend on beside the data, in a line."""
        meter: Any = self.meters["test"]
        options = [f"{meter.metric} distance"]
        options += ["features of length 1"] if self.normalize else []
        options += ["mirror images added"] if self.flip_test else []
        options += ["AP by trapezoids (oxford)"] if meter.ap == "oxford" else []
        return ", ".join(options)

    def features(self, batch: dict[str, Any]) -> Tensor:
        """What a batch is retrieved by, with all options of the evaluation.

        Args:
            batch: with ``image`` [B, 3, H, W], or ``clips``, a list of B tensors [n, T, 3, H, W].

        Returns:
            [B, D].
        """
        if "clips" in batch:
            found = torch.stack([feature.mean(dim=0) for feature in self._clip_features(batch["clips"])])
        else:
            found = self._mirrored_too(batch["image"])
        return F.normalize(found) if self.normalize else found

    def _clip_features(self, clips: list[Tensor]) -> list[Tensor]:
        """The features of the clips of each tracklet, [n, D]; clips of equal length go through the network together."""
        lengths = [len(each) for each in clips]
        if len({each.shape[1:] for each in clips}) > 1:
            return [self._clip_features([each])[0] for each in clips]
        parts = [self._mirrored_too(part) for part in torch.cat(clips).split(self.clips_at_once)]
        return list(torch.cat(parts).split(lengths))

    def _mirrored_too(self, pixels: Tensor) -> Tensor:
        if pixels.dim() == 4:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        found = self.embed(pixels)
        return found + self.embed(pixels.flip(-1)) if self.flip_test else found

    def evaluate(self, batch: Any, split: str) -> None:
        self.meters[split].update(self.features(batch), batch["person"], batch["camera"], batch["query"])  # type: ignore[operator]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to collect anew."""
        meter: Any = self.meters[split]
        if self.trainer.sanity_checking:  # a few batches: queries without a gallery
            meter.reset()
            return
        scores: RetrievalScores = meter.compute()
        meter.reset()
        self.scores[split] = scores
        self.log(f"{split}_map", scores.mean_ap.float(), prog_bar=True)
        self._log_ranks(f"{split}_", scores)
        self.log(f"{split}_queries", scores.scored.float())
        if scores.reranked is not None:
            self.log(f"{split}_reranked_map", scores.reranked.mean_ap.float())
            self._log_ranks(f"{split}_reranked_", scores.reranked)

    def _log_ranks(self, prefix: str, scores: RetrievalScores) -> None:
        for rank in LOGGED_RANKS:
            self.log(f"{prefix}rank{rank}", scores.at(rank).float())
        self.log(f"{prefix}minp", scores.mean_inp.float())
