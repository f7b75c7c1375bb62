"""The persons of the embedded world: repeatable, never the same in two splits or domains, and seen by cameras."""

from typing import Any

import numpy as np
import pytest
import torch

from gingham.data.wardrobe.cameras import CAMERAS, identity_of, scenery
from gingham.data.wardrobe.persons import PersonImages, make_person
from gingham.data.wardrobe.tracklets import Tracklets, make_tracklet

SPLITS = ("train", "val_query", "val_gallery", "query", "gallery")


def test_a_picture_depends_on_its_person_camera_and_number_alone() -> None:
    for split in SPLITS:
        few, many = PersonImages(split, 2, images=3), PersonImages(split, 4, images=6, cache=True)
        for name, item in zip(few.names, few, strict=True):
            other = many[many.names.index(name)]
            assert torch.equal(item["image"], other["image"]) and item["person"] == other["person"], name
    few, many = Tracklets("train", 1, frames=3), Tracklets("train", 2, tracklets=3, frames=5, cache=True)
    for name, item in zip(few.names, few, strict=True):
        assert torch.equal(item["frames"], many[many.names.index(name)]["frames"][:3]), name


def test_queries_are_the_first_of_each_camera_and_the_gallery_the_rest() -> None:
    query, gallery = PersonImages("query", 3, images=3), PersonImages("gallery", 3, images=3)
    assert len(query) == 6 and len(gallery) == 12 and not set(query.names) & set(gallery.names)
    assert query.persons.tolist() == [6001, 6001, 6002, 6002, 6003, 6003] and query.cameras.tolist() == [0, 1] * 3
    assert query.names[0] == "6001_c1s1_000001_00" and gallery.names[0] == "6001_c1s1_000002_00"
    train = PersonImages("train", 3, images=3)
    assert len(train) == 18 and train.persons.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert len(Tracklets("query", 3)) == 6 == len(Tracklets("gallery", 3)) and len(Tracklets("train", 3)) == 12


def test_persons_of_splits_and_domains_are_different() -> None:
    found = [
        identity_of(split, domain, i) for split in ("train", "val", "test") for domain in CAMERAS for i in range(9)
    ]
    assert len(set(found)) == len(found)


def test_validation_and_test_stand_before_photographs_that_training_of_their_domain_has_not() -> None:
    for domain in CAMERAS:
        seen = {photograph.tobytes() for photograph in scenery("train", domain).photographs}
        for split in ("val", "test"):
            photographs = {photograph.tobytes() for photograph in scenery(split, domain).photographs}
            assert len(photographs) == len(seen) == 2 and not photographs & seen, (split, domain)


def test_cameras_see_the_same_person_differently() -> None:
    means = {}
    for domain in CAMERAS:
        for camera in (0, 1):
            pictures = np.stack([make_person("train", domain, n, camera, i) for n in range(6) for i in range(2)])
            means[domain, camera] = pictures.mean((0, 1, 2))
    apart = {domain: np.abs(means[domain, 0] - means[domain, 1]).mean() for domain in CAMERAS}
    assert apart["target"] > apart["source"]
    same = make_person("train", "source", 0, 0, 0)
    assert not np.array_equal(same, make_person("train", "source", 0, 0, 1))
    assert not np.array_equal(same, make_person("train", "source", 1, 0, 0))


def test_grey_stays_grey_when_hues_are_turned() -> None:
    rng, grey = np.random.default_rng(0), np.full((4, 4, 3), 100, np.float32)
    from dataclasses import replace

    plain = replace(CAMERAS["target"][0], gain=(1, 1, 1), offset=(0, 0, 0), noise=0)
    assert (plain.take(grey, rng) == 100).all()
    red = np.array([[[200.0, 50, 50]]], np.float32)
    assert plain.take(red, rng).ravel().tolist() != [200, 50, 50]
    third = replace(plain, hue=120)  # red becomes green
    assert third.take(red, rng).ravel().tolist() == [50, 200, 50]


def test_something_is_in_front_of_the_person_in_most_frames() -> None:
    made = [make_tracklet("train", "source", n, c, 0, frames=20) for n in range(4) for c in (0, 1)]
    heights = np.concatenate([x.hidden[:, 1] - x.hidden[:, 0] for x in made])
    assert 0.45 < (heights > 0).mean() < 0.75
    covered = heights[heights > 0] / 64
    assert covered.min() >= 0.34 and covered.max() <= 0.61 and covered.std() > 0.03
    clear = [make_tracklet("train", "source", n, c, 0, frames=20, occlusion=0.0) for n in range(4) for c in (0, 1)]
    for one, other in zip(made, clear, strict=True):
        assert (other.hidden == 0).all()
        for frame, free, (first, last) in zip(one.frames, other.frames, one.hidden, strict=True):
            assert np.array_equal(frame[:first], free[:first]) and np.array_equal(frame[last:], free[last:])
            assert first == last or not np.array_equal(frame[first:last], free[first:last])


def test_what_hides_and_what_is_behind_is_next_to_grey_and_of_any_brightness() -> None:
    made = [make_tracklet(split, "source", n, 0, 0, frames=12) for split in ("train", "val", "test") for n in range(6)]
    hiding = [frame[top:end] for x in made for frame, (top, end) in zip(x.frames, x.hidden, strict=True) if end > top]
    behind = [frame[:, :2] for x in made for frame, (top, end) in zip(x.frames, x.hidden, strict=True) if end == top]
    for patches in (hiding, behind):
        colours = np.stack([patch.mean((0, 1)) for patch in patches])
        assert np.ptp(colours, axis=1).mean() < 24 and np.ptp(colours.mean(1)) > 70
        assert np.mean([patch.std((0, 1)) for patch in patches]) < 20


def test_hidden_pixels_come_with_the_items() -> None:
    tracklets = Tracklets("query", 2, frames=6, cache=True)
    item = tracklets[1]
    assert item["occluded"].shape == (6, 64, 32) and item["occluded"].dtype == torch.bool
    hidden = make_tracklet("test", "source", 0, 1, 0, frames=6).hidden
    assert item["occluded"].sum((1, 2)).tolist() == (32 * (hidden[:, 1] - hidden[:, 0])).tolist()
    assert torch.equal(tracklets.clip(1, [4, 2])["occluded"], item["occluded"][[4, 2]])


def test_what_is_kept_stays_as_it_is() -> None:
    images, tracklets = PersonImages("query", 1, cache=True), Tracklets("query", 1, cache=True)
    images[0]["image"].zero_()
    tracklets[0]["frames"].zero_()
    assert images[0]["image"].any() and tracklets[0]["frames"].any()
    assert images.picture(0).shape == tracklets.picture(0).shape == (3, 64, 32)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (PersonImages, {"persons": -1}),
        (PersonImages, {"persons": 3001}),
        (PersonImages, {"images": 1}),
        (PersonImages, {"domain": "moon"}),
        (Tracklets, {"tracklets": 1}),
        (Tracklets, {"frames": 0}),
        (Tracklets, {"occlusion": 1.1}),
        (Tracklets, {"split": "test"}),
    ],
    ids=str,
)
def test_worlds_that_cannot_be_are_named(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        make(**{"split": "train", "persons": 1} | options)
