"""The embedded world: real garments on photographs, composed into tasks that need what a method claims to give.

`assets` loads the garments and photographs that come with the package, `garments` cuts, tints and paints one garment,
`cue_scenes` composes the task of CCNet, `dolls` that of SCHP, `point_scenes` that of PDML, `tag_scenes` that of SeeNet,
`episode_scenes` that of SG-One, `lookalike_scenes` that of DCR, `tracklets` that of STA, `persons` that of one-shot
re-identification, both seen by `cameras`, and `export`, `detection_export` and `reid_export` write them to disk in the
published layouts.
Sample `i` of a split depends on the split and `i` alone.
"""

from gingham.data.wardrobe.assets import Wardrobe, load_wardrobe
from gingham.data.wardrobe.cue_scenes import CUE_LABELS, CueScenes, make_cue_scene
from gingham.data.wardrobe.detection_export import write_coco, write_voc_detection
from gingham.data.wardrobe.dolls import DOLL_LABELS, Dolls, corrupt_labels, make_doll
from gingham.data.wardrobe.episode_scenes import CategoryScenes, GarmentScenes
from gingham.data.wardrobe.export import (
    write_cityscapes,
    write_lip,
    write_pascal_context,
    write_voc,
    write_voc_tags,
)
from gingham.data.wardrobe.garments import Category
from gingham.data.wardrobe.lookalike_scenes import LookAlikeScenes, make_lookalike_scene
from gingham.data.wardrobe.persons import PersonImages
from gingham.data.wardrobe.point_scenes import POINT_SCENE_LABELS, PointScenes
from gingham.data.wardrobe.reid_export import write_market1501, write_mars
from gingham.data.wardrobe.scale_scenes import SCALE_LABELS, ScaleScenes, make_scale_scene
from gingham.data.wardrobe.tag_scenes import TAG_SCENE_LABELS, TagScenes, make_tag_scene
from gingham.data.wardrobe.tracklets import Tracklets

__all__ = [
    "CUE_LABELS",
    "DOLL_LABELS",
    "POINT_SCENE_LABELS",
    "SCALE_LABELS",
    "TAG_SCENE_LABELS",
    "Category",
    "CategoryScenes",
    "CueScenes",
    "Dolls",
    "GarmentScenes",
    "LookAlikeScenes",
    "PersonImages",
    "PointScenes",
    "ScaleScenes",
    "TagScenes",
    "Tracklets",
    "Wardrobe",
    "corrupt_labels",
    "load_wardrobe",
    "make_cue_scene",
    "make_doll",
    "make_lookalike_scene",
    "make_scale_scene",
    "make_tag_scene",
    "write_cityscapes",
    "write_coco",
    "write_lip",
    "write_market1501",
    "write_mars",
    "write_pascal_context",
    "write_voc",
    "write_voc_detection",
    "write_voc_tags",
]
