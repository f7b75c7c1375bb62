"""The embedded world: real garments on photographs, composed into tasks that need what a method claims to give.

`assets` loads the garments and photographs that come with the package, `garments` cuts, tints and paints one garment,
`cue_scenes` composes the task of CCNet, and `export` writes scenes to disk in the published layouts. Sample `i` of a
split depends on the split and `i` alone.
"""

from gingham.data.wardrobe.assets import Wardrobe, load_wardrobe
from gingham.data.wardrobe.cue_scenes import CUE_LABELS, CueScenes, make_cue_scene
from gingham.data.wardrobe.export import write_cityscapes
from gingham.data.wardrobe.garments import Category

__all__ = ["CUE_LABELS", "Category", "CueScenes", "Wardrobe", "load_wardrobe", "make_cue_scene", "write_cityscapes"]
