"""What each method claims on the embedded world: its arms, what is measured, and which arm must beat which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_RECIPE = "model.init_args."
_NETWORK = _RECIPE + "network."
_CALLBACK = "trainer.callbacks.0.init_args."
# On the validation split two stages score best at this rate without supervision of the first, at 0.01 with it.
_UNSUPERVISED = {_RECIPE + "stage_weights": [0.0, 1.0], _RECIPE + "learning_rate": 0.004}
_NO_LABEL_FILES = {_CALLBACK + "write_labels": False}
_NO_AVERAGE = {_CALLBACK + "average_weights": False, _CALLBACK + "estimate_batch_norm": False}


@dataclass(frozen=True)
class Score:
    """A figure of the table.

    Args:
        title: in the table.
        metric: what follows ``test_`` in the name of the metric that it shows.
        factor: what the metric is multiplied by; 100 for shares.
        decimals: places after the point.
        lower_is_better: whether claims are that it falls.
    """

    title: str
    metric: str
    factor: float = 100.0
    decimals: int = 1
    lower_is_better: bool = False


@dataclass(frozen=True)
class Comparison:
    """The claim that an arm beats another with the same seed in one of the scores, or the mere difference.

    Args:
        arm: whose score is looked at.
        baseline: whose score is subtracted.
        floor: the difference that is claimed at least, or at most where a lower score is better; None without a claim.
        statistic: of the differences by seed, which has to reach the floor.
        score: title of the score, by default the demo's first.
        baseline_score: title of the baseline's, where that is another.
        relative: whether differences are in percent of the baseline's score.
    """

    arm: str
    baseline: str
    floor: float | None = None
    statistic: Literal["mean", "median"] = "mean"
    score: str | None = None
    baseline_score: str | None = None
    relative: bool = False

    @property
    def name(self) -> str:
        """What the report calls it."""
        score = f", {self.score}" if self.score else ""
        baseline = self.baseline_score or self.baseline
        return f"{self.arm} - {baseline}{score}{', %' if self.relative else ''}"

    def claim(self, *, falls: bool) -> str:
        """The floor in words, where there is one; ``falls`` where a lower score is better."""
        return f"at {'most' if falls else 'least'} {self.floor:+.1f}{' %' if self.relative else ''}"

    def shown_by(self, difference: Mapping[str, Any], *, falls: bool) -> bool | None:
        """Whether the floor is reached and the interval clear of zero; None without a floor or an interval.

        A floor that allows a loss is beyond zero: then the interval is to be clear of the floor.
        """
        if self.floor is None or difference["interval_95"] is None:
            return None
        value, (low, high) = difference[self.statistic], difference["interval_95"]
        if falls:
            return bool(value <= self.floor and high < max(0.0, self.floor))
        return bool(value >= self.floor and low > min(0.0, self.floor))


@dataclass(frozen=True)
class Length:
    """What a shorter demo changes: the data set's lengths (train, val, test), options by their paths, and the arms."""

    lengths: tuple[int, int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demo:
    """A method on the embedded world, against its own baseline.

    Args:
        title: for the report.
        config: the packaged configuration that every arm begins with.
        arms: by name, the options that differ, by their paths in the configuration.
        scores: what is measured; the first is what arms are compared by where a comparison names none.
        comparisons: which arm is to beat which; the first is the one that the table of all demos has.
        bounds: arms that see more than the method may, and show what could be had at best.
        course: a metric whose values during training are reported, or None.
        unit: what the lengths of the data set count.
        quick: minutes; by default the whole demo.
        smoke: seconds, to see that it runs.
    """

    title: str
    config: str
    arms: Mapping[str, Mapping[str, Any]]
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    smoke: Length
    quick: Length = Length()
    bounds: tuple[str, ...] = ()
    course: str | None = None
    unit: str = "pictures"

    @property
    def headline_arms(self) -> tuple[str, ...]:
        """The arms of the first comparison, and the upper bounds, in the order of all arms."""
        first = self.comparisons[0]
        return tuple(arm for arm in self.arms if arm in (first.arm, first.baseline, *self.bounds))

    def score_of(self, comparison: Comparison) -> Score:
        """The score that a comparison is about."""
        return next(score for score in self.scores if comparison.score in (None, score.title))


_GUIDANCE = {
    "no support": {_NETWORK + "guidance": "none"},
    "global pooling": {_NETWORK + "guidance": "global"},
    "background blanked": {_NETWORK + "guidance": "blanked"},
    "masked pooling": {},
}
_EPISODE_SCORES = (
    Score("IoU of novel classes", "miou"),
    Score("FB-IoU", "fb_iou"),
    Score("all foreground", "all_foreground"),
)
_FEW_EPISODES = {
    "trainer.max_epochs": 1,
    "data.init_args.episodes_per_epoch": 32,
    "data.init_args.validation_episodes": 10,
    "data.init_args.protocol.episodes": 10,
}

DEMOS = {
    "ccnet": Demo(
        title="CCNet on the cue scenes",
        config="ccnet_world",
        arms={f"R={loops}": {_NETWORK + "loops": loops} for loops in (0, 1, 2)},
        scores=(Score("trousers-IoU", "focus_iou"), Score("mIoU", "miou")),
        comparisons=(
            Comparison("R=1", "R=0", floor=8.0),
            Comparison("R=2", "R=1", floor=10.0, statistic="median"),
            Comparison("R=2", "R=0"),
        ),
        quick=Length((1600, 300, 300), {"trainer.max_epochs": 6}, ("R=0", "R=2")),
        smoke=Length((64, 16, 16), {"trainer.max_epochs": 1}, ("R=0", "R=2")),
    ),
    "spgnet": Demo(
        title="SPGNet on scenes of garments at three scales",
        config="spgnet_world",
        arms={
            "stages alone": {_NETWORK + "guidance": False, **_UNSUPERVISED},
            "supervised stages": {_NETWORK + "guidance": False},
            "gate without supervision": _UNSUPERVISED,
            "full": {},
        },
        scores=(Score("mIoU", "miou"), Score("trousers-IoU", "focus_iou")),
        comparisons=(
            Comparison("full", "stages alone", floor=1.0),
            Comparison("full", "supervised stages", floor=1.0),
            Comparison("full", "gate without supervision"),
        ),
        quick=Length(arms=("supervised stages", "full")),
        smoke=Length((40, 10, 10), {"trainer.max_epochs": 1}, ("supervised stages", "full")),
    ),
    "schp": Demo(
        title="SCHP on dolls with noisy labels",
        config="schp_world",
        arms={
            "base": {"trainer.callbacks": []},
            "schedule only": {_CALLBACK + "refine_labels": False, **_NO_AVERAGE},
            "weights only": {_CALLBACK + "refine_labels": False},
            "labels only": {**_NO_AVERAGE, **_NO_LABEL_FILES},
            "both": _NO_LABEL_FILES,
            "clean labels": {"trainer.callbacks": [], "data.init_args.noise": False},
        },
        scores=(Score("mIoU", "miou"), Score("boundary IoU", "boundary_iou"), Score("accuracy", "pixel_accuracy")),
        comparisons=(
            Comparison("both", "base", floor=1.5),
            Comparison("schedule only", "base"),
            Comparison("weights only", "schedule only"),
            Comparison("labels only", "schedule only"),
            Comparison("both", "schedule only"),
            Comparison("both", "weights only"),
        ),
        bounds=("clean labels",),
        course="val_average_miou",
        quick=Length(arms=("base", "both")),
        smoke=Length(
            (40, 10, 10),
            {
                "trainer.max_epochs": 3,
                "trainer.check_val_every_n_epoch": 1,
                **{_CALLBACK + name: value for name, value in {"start": 1, "cycle": 1, "warmup": 0}.items()},
            },
            ("base", "both"),
        ),
    ),
    "dap": Demo(
        title="DaP on garments of Fashion-MNIST",
        config="dap_world",
        arms={
            "full": {_CALLBACK + "budget": 1.0},  # to the bit what is trained without the callback
            "shorter": {_CALLBACK + "budget": 1.0, "trainer.max_epochs": 6},  # three quarters
            "random drop": {_CALLBACK + "drop": "random", _CALLBACK + "smoothing": 1.0},
            "hardest drop": {_CALLBACK + "drop": "hardest"},
            "DaP": {},
        },
        scores=(Score("accuracy", "accuracy", decimals=2), Score("thousand visits", "visits", 0.001)),
        comparisons=(
            Comparison("DaP", "random drop", floor=0.3),
            Comparison("DaP", "full", floor=-0.5, relative=True),
            Comparison("DaP", "shorter", floor=0.0),
            Comparison("DaP", "hardest drop"),
        ),
        bounds=("full",),
        quick=Length((2400, 600, 1000)),
        smoke=Length(
            (200, 20, 20),
            {
                "trainer.max_epochs": 4,
                "trainer.check_val_every_n_epoch": 1,
                _CALLBACK + "cycle": 2,
                _CALLBACK + "warmup": 0,
                _CALLBACK + "final": 0,
            },
            ("full", "DaP"),
        ),
    ),
    "dcr": Demo(
        title="DCR on scenes of small garments and look-alikes",
        config="dcr_world",
        arms={
            "base": {_NETWORK + "refine": False},
            "branch alone": {_NETWORK + "fusion": "refined"},
            "late features": {_NETWORK + "fork": "1", _NETWORK + "pool_size": 8},
            "released sampling": {
                _NETWORK + "sampling.background_low": 0.0,
                _NETWORK + "sampling.require_foreground_prediction": False,
            },
            "DCR": {},
        },
        scores=(
            Score("AP50", "ap50"),
            Score("AP", "ap"),
            Score("false positives an image", "false_positives", 1.0, lower_is_better=True),
        ),
        comparisons=(
            Comparison("DCR", "base", floor=2.0),
            Comparison("DCR", "base", floor=-15.0, score="false positives an image", relative=True),
            Comparison("DCR", "branch alone"),
            Comparison("DCR", "late features"),
            Comparison("DCR", "released sampling"),
        ),
        quick=Length(arms=("base", "DCR")),
        smoke=Length((32, 8, 8), {"trainer.max_epochs": 1}, ("base", "DCR")),
    ),
    "oneshot_reid": Demo(
        title="One-shot adaptation to other cameras, of which one picture a person is labelled",
        config="oneshot_reid_world",
        arms={
            "direct transfer": {"trainer.max_epochs": 20},  # the epochs on the source
            # The lower the rate, the less harm the labelled pictures alone do on the validation split.
            "one-shot only": {
                _CALLBACK + "labels": "given",
                _CALLBACK + "self_mining": False,
                _CALLBACK + "rate": 0.001,
            },
            "pseudo labels": {_RECIPE + "weighting": "none", _CALLBACK + "self_mining": False},
            "with weights": {_CALLBACK + "self_mining": False},
            "full": {},
            "all labels": {_CALLBACK + "labels": "true", _CALLBACK + "self_mining": False},
        },
        scores=(Score("mAP", "map"), Score("rank 1", "rank1")),
        comparisons=(
            Comparison("full", "direct transfer", floor=8.0),
            Comparison("full", "one-shot only", floor=3.0),
            Comparison("with weights", "pseudo labels"),
            Comparison("full", "with weights"),
        ),
        bounds=("all labels",),
        course="pseudo_accuracy",
        unit="persons",
        quick=Length(arms=("direct transfer", "one-shot only", "full")),
        smoke=Length(
            (20, 6, 6),
            {
                "trainer.max_epochs": 6,
                "trainer.check_val_every_n_epoch": 2,
                "data.init_args.images": 4,
                "data.init_args.steps_per_epoch": 1,
                _RECIPE + "network.target_classes": 20,
                _CALLBACK + "start": 4,
                _CALLBACK + "epochs": 1,
                _CALLBACK + "decay_epoch": 1,
            },
            ("direct transfer", "full"),
        ),
    ),
    "pdml": Demo(
        title="PDML on scenes with one labelled pixel an object",
        config="pdml_world",
        arms={
            "points": {_RECIPE + "metric": None, _RECIPE + "extension": None},
            "metric within images": {
                _RECIPE + "metric.scope": "image",
                _RECIPE + "metric.memory": 0,
                _RECIPE + "extension": None,
            },
            "metric across images": {_RECIPE + "extension": None},
            "extension": {_RECIPE + "metric": None},
            "metric and extension": {},
            "all labels": {_RECIPE + "metric": None, _RECIPE + "extension": None, _RECIPE + "supervision": "labels"},
        },
        scores=(
            Score("mIoU", "miou"),
            Score("purity", "purity"),
            Score("distance ratio", "distance_ratio", 1.0, decimals=2),
        ),
        comparisons=(
            Comparison("metric and extension", "points", floor=3.0),
            Comparison("metric across images", "points", floor=3.0),
            Comparison("metric across images", "metric within images"),
            Comparison("extension", "points"),
            Comparison("metric and extension", "extension"),
        ),
        bounds=("all labels",),
        quick=Length(arms=("points", "metric and extension")),
        smoke=Length((16, 4, 4), {"trainer.max_epochs": 1}, ("points", "metric and extension")),
    ),
    "sgone": Demo(
        title="SG-One on garments that were never trained on, each shown in one other scene",
        config="sgone_world",
        arms=_GUIDANCE,
        scores=_EPISODE_SCORES,
        comparisons=(
            Comparison("masked pooling", "global pooling", floor=20.0),
            Comparison("masked pooling", "masked pooling", floor=0.0, baseline_score="all foreground"),
            Comparison("masked pooling", "no support"),
            Comparison("masked pooling", "background blanked"),
        ),
        quick=Length(arms=("global pooling", "masked pooling")),
        smoke=Length((40, 20, 20), _FEW_EPISODES, ("global pooling", "masked pooling")),
    ),
    "sgone_categories": Demo(
        title="SG-One on categories of garments that were never trained on, each shown in one other scene",
        config="sgone_world",
        arms={arm: {**options, "data.init_args.name": "wardrobe_categories"} for arm, options in _GUIDANCE.items()},
        scores=_EPISODE_SCORES,
        comparisons=(
            Comparison("masked pooling", "masked pooling", floor=0.0, baseline_score="all foreground"),
            Comparison("masked pooling", "global pooling"),
            Comparison("masked pooling", "no support"),
            Comparison("masked pooling", "background blanked"),
        ),
        quick=Length(arms=("global pooling", "masked pooling")),
        smoke=Length((40, 20, 20), _FEW_EPISODES, ("global pooling", "masked pooling")),
    ),
    "seenet": Demo(
        title="SeeNet on scenes with image-level labels",
        config="seenet_world",
        arms={
            "CAM": {_NETWORK + "erase": False, _NETWORK + "background_threshold": None},
            "erasing": {_NETWORK + "train_thresholds": [0.5, 0.0], _NETWORK + "background_threshold": None},
            "SeeNet": {},
        },
        scores=(
            Score("IoU at 0.3", "seed_iou"),
            Score("IoU", "object_iou"),
            Score("leakage", "leakage", lower_is_better=True),
            Score("threshold", "threshold"),
        ),
        comparisons=(
            Comparison("SeeNet", "CAM", floor=8.0),
            Comparison("SeeNet", "CAM", score="IoU"),
            Comparison("SeeNet", "CAM", floor=0.0, score="leakage"),
            Comparison("CAM", "erasing", floor=0.0, score="leakage"),
            Comparison("SeeNet", "erasing"),
            Comparison("SeeNet", "erasing", score="IoU"),
            Comparison("SeeNet", "erasing", score="leakage"),
        ),
        course="val_leakage",
        quick=Length(arms=("CAM", "SeeNet")),
        smoke=Length((32, 8, 8), {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}, ("CAM", "SeeNet")),
    ),
    "sta": Demo(
        title="STA on tracklets of dolls whom something hides in most frames",
        config="sta_world",
        arms={
            "average": {_NETWORK + "attention": "none", _RECIPE + "regularization": 0.0},
            "weighted sum": {_NETWORK + "attention": "sum"},
            "no regularisation": {_RECIPE + "regularization": 0.0},
            "STA": {},
            "nothing hidden": {"data.init_args.occlusion": 0.0},
        },
        scores=(
            Score("mAP", "map"),
            Score("rank 1", "rank1"),
            Score("attention on what hides", "occluded_attention", lower_is_better=True),
            Score("entropy", "entropy"),
        ),
        comparisons=(
            Comparison("STA", "average", floor=2.0),
            Comparison("STA", "average", floor=0.0, score="attention on what hides"),
            Comparison("STA", "average", score="rank 1"),
            Comparison("STA", "weighted sum"),
            Comparison("STA", "no regularisation"),
        ),
        bounds=("nothing hidden",),
        unit="persons",
        quick=Length(arms=("average", "STA")),
        smoke=Length((16, 4, 4), {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}, ("average", "STA")),
    ),
}
