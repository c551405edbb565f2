"""Laws of folder layouts and manifests: what is a picture, what is normal, which mask belongs to whom."""

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.layouts import DataSpec, Item, Listing
from anomaly_vae.listing import list_pictures


def picture(path: Path, size: tuple[int, int] = (20, 20), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def listed(root: Path, **data: object) -> Listing:
    return list_pictures(root, DataSpec.parse(data))


def by_key(listing: Listing) -> dict[str, Item]:
    return {item.key: item for item in listing.items}


def mvtec(root: Path) -> Path:
    for i in range(3):
        picture(root / "train" / "good" / f"{i:03}.png")
    picture(root / "test" / "good" / "000.png")
    for kind in ("broken", "scratch"):
        for i in range(2):
            picture(root / "test" / kind / f"{i:03}.png")
            picture(root / "ground_truth" / kind / f"{i:03}_mask.png")
    return root


def test_mvtec_keeps_its_parts_kinds_and_masks(tmp_path: Path) -> None:
    items = by_key(listed(mvtec(tmp_path)))
    assert len(items) == 8
    assert {key for key, item in items.items() if item.split == "train"} == {f"train/good/00{i}.png" for i in range(3)}
    assert items["test/good/000.png"].normal
    assert items["test/good/000.png"].split == "test"
    for kind in ("broken", "scratch"):
        for i in range(2):
            item = items[f"test/{kind}/00{i}.png"]
            assert (item.label, item.normal, item.split) == (kind, False, "test")
            assert item.mask == tmp_path / "ground_truth" / kind / f"00{i}_mask.png"


def test_pictures_directly_in_train_are_normal(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "test" / "bad" / "b.png")
    assert {(i.key, i.label, i.normal) for i in listed(tmp_path).items} == {
        ("train/a.png", "good", True),
        ("test/bad/b.png", "bad", False),
    }


@pytest.mark.parametrize("name", ["good", "normal", "Good"])
def test_a_normal_folder_makes_all_other_folders_kinds(tmp_path: Path, name: str) -> None:
    picture(tmp_path / name / "deeper" / "a.png")
    picture(tmp_path / "dent" / "b.jpg")
    picture(tmp_path / "hole" / "c.bmp")
    (tmp_path / "empty").mkdir()
    items = listed(tmp_path).items
    assert {(item.label, item.normal) for item in items} == {(name, True), ("dent", False), ("hole", False)}
    assert all(item.split is None for item in items)


@pytest.mark.parametrize(
    "mask", ["mask/b.png", "mask/b_mask.png", "mask/dent/b.bmp", "masks/b-gt.png", "ground_truth/dent/b_mask.png"]
)
def test_a_mask_is_found_by_the_name_of_its_picture(tmp_path: Path, mask: str) -> None:
    picture(tmp_path / "good" / "a.png")
    picture(tmp_path / "dent" / "b.jpg")
    path = picture(tmp_path / mask)
    listing = listed(tmp_path)
    assert by_key(listing)["dent/b.jpg"].mask == path
    assert by_key(listing)["good/a.png"].mask is None
    assert len(listing.items) == 2
    assert not listing.notes


def test_a_mask_that_two_kinds_claim_goes_to_none_and_this_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "good" / "a.png")
    picture(tmp_path / "dent" / "b.png")
    picture(tmp_path / "hole" / "b.png")
    picture(tmp_path / "mask" / "b.png")
    listing = listed(tmp_path)
    assert all(item.mask is None for item in listing.items)
    assert "no mask to 2 pictures" in listing.notes[0]


def test_a_mask_beside_its_picture_is_no_picture(tmp_path: Path) -> None:
    picture(tmp_path / "good" / "a.png")
    picture(tmp_path / "dent" / "b.png")
    mask = picture(tmp_path / "dent" / "b_mask.png")
    items = by_key(listed(tmp_path))
    assert set(items) == {"good/a.png", "dent/b.png"}
    assert items["dent/b.png"].mask == mask


def test_masks_without_a_picture_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "good" / "a.png")
    picture(tmp_path / "mask" / "zzz.png")
    assert listed(tmp_path).notes == ("found no picture of the name of 1 mask",)


def test_a_flat_folder_is_all_normal(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "c.tif"):
        picture(tmp_path / name)
    listing = listed(tmp_path)
    assert [item.key for item in listing.items] == ["a.PNG", "b.png", "c.tif"]
    assert all(item.normal and item.label == "good" for item in listing.items)


def test_flat_goes_to_any_depth_when_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "monday" / "a.png")
    picture(tmp_path / "tuesday" / "a.png")
    assert all(item.normal for item in listed(tmp_path, layout="flat").items)


@pytest.mark.parametrize("where", [".", "train"])
def test_without_a_normal_folder_the_error_names_folders_and_remedy(tmp_path: Path, where: str) -> None:
    for name in ("smiling", "neutral"):
        picture(tmp_path / where / name / "a.png")
    with pytest.raises(DataError) as caught:
        listed(tmp_path)
    message = str(caught.value)
    assert "neutral, smiling" in message
    assert "data.normal=[NAME]" in message
    assert "\n" not in message
    items = listed(tmp_path, normal=["neutral"]).items
    assert {item.label for item in items if item.normal} == {"neutral"}


def test_a_folder_of_data_sets_is_told_from_one(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    mvtec(tmp_path / "cable")
    with pytest.raises(DataError, match=r"several data sets; give one of them, such as .*bottle"):
        listed(tmp_path)


def test_litter_is_ignored_and_other_files_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in (".hidden.png", "._a.png", "Thumbs.db", "notes.txt", "__MACOSX/b.png", ".git/c.png", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = listed(tmp_path)
    assert [item.key for item in listing.items] == ["a.png"]
    assert listing.notes == ("ignored 2 files of other kinds",)


@pytest.mark.parametrize("make", [mvtec, lambda root: picture(root / "good" / "a.png").parent.parent])
def test_known_anomalies_take_no_part(tmp_path: Path, make: object) -> None:
    make(tmp_path)  # type: ignore[operator]
    before = listed(tmp_path).items
    picture(tmp_path / "known_anomalies" / "x.png")
    listing = listed(tmp_path)
    assert listing.items == before
    assert [item.key for item in listing.known] == ["known_anomalies/x.png"]
    assert listing.notes == ("known_anomalies: 1 picture, for training alone",)


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere" / "b.png").parent
    root = tmp_path / "root"
    picture(root / "good" / "a.png")
    (root / "good" / "again").symlink_to(root, target_is_directory=True)
    (root / "good" / "more").symlink_to(elsewhere, target_is_directory=True)
    listing = listed(root)
    assert [item.key for item in listing.items] == ["good/a.png", "good/more/b.png"]
    assert listing.notes == ("did not follow 1 link back to a folder above",)


def test_a_broken_link_is_listed_so_that_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert [item.key for item in listed(tmp_path).items] == ["a.png"]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only Linux stores names that are no UTF-8")
def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    source = picture(tmp_path / "x.png")
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(odd)).mkdir()
    source.rename(os.fsdecode(odd + b"/\xff.png"))
    picture(tmp_path / "good" / "a.png")
    item = next(item for item in listed(tmp_path).items if not item.normal)
    assert item.key == "caf\\xe9/\\xff.png"
    assert item.label == "caf\\xe9"
    item.key.encode("utf-8")
    assert item.path is not None
    assert item.path.read_bytes()


def test_the_order_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.png" for kind in ("good", "dent", "Zebra") for i in range(12)]
    orders = []
    for attempt in range(2):
        random.Random(attempt).shuffle(names)
        for name in names:
            picture(tmp_path / str(attempt) / name)
        orders.append([item.key for item in listed(tmp_path / str(attempt)).items])
    assert orders[0] == orders[1] == sorted(names)


@pytest.mark.parametrize("root", ["nowhere", "empty", "text.txt"])
def test_what_holds_no_pictures_is_one_line(tmp_path: Path, root: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        listed(tmp_path / root)
    assert "\n" not in str(caught.value)
    assert "give" in str(caught.value)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for name in ("a.png", "sub/b.png", "c.png", "c-mask.png"):
        picture(tmp_path / name)
    return tmp_path / "manifest.csv"


def test_a_manifest_says_everything(manifest: Path) -> None:
    manifest.write_text(
        "path,label,mask,group,split,camera\n"
        "a.png,good,,p1,train,x\n\n"
        "sub/b.png,Good,,p2,validation,x\n"
        '"c.png",dent,c-mask.png,,test,y\n'
    )
    for root in (manifest, manifest.parent):
        listing = listed(root)
        folder = manifest.parent
        assert listing.items == (
            Item(folder / "a.png", "a.png", "good", True, None, "p1", "train"),
            Item(folder / "sub/b.png", "sub/b.png", "Good", True, None, "p2", "train"),
            Item(folder / "c.png", "c.png", "dent", False, folder / "c-mask.png", None, "test"),
        )
        assert listing.notes == ("columns of the manifest that are not used: camera",)


def test_a_manifest_of_paths_alone_is_all_normal(manifest: Path) -> None:
    manifest.write_text("\ufeffPath;note\na.png;x\nc.png;y\n", encoding="utf-8")
    assert [(item.key, item.normal) for item in listed(manifest).items] == [("a.png", True), ("c.png", True)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,good\n", "line 1: no column `path`"),
        ("", "line 1: no column `path`"),
        ("path\n", "lists no pictures"),
        ("path,label\na.png,good\n,good\n", "line 3: the path is empty"),
        ("path,label\na.png,good\nnowhere.png,good\n", r"line 3: no such file .*nowhere.png"),
        ("path,label,mask\na.png,good,\nc.png,dent,m.png\n", r"line 3: no such file .*m.png"),
        ("path,label\na.png,good\nc.png,\n", "line 3: the label is empty"),
        ("path,label\na.png,good\n\na.png,good\n", "line 4: a.png is listed on line 2 already"),
        ("path,split\na.png,train\nc.png,later\n", "line 3: the split is 'later'"),
        ("path,label\na.png,ok\nc.png,dent\n", r"labels dent, ok, .*data.normal=\[dent\]"),
        ("path,label\na\0b.png,good\n", "line 2"),
        ("path,label\n" + "a" * 5000 + ".png,good\n", "line 2: no such file"),
    ],
)
def test_mistakes_of_a_manifest_name_their_line(manifest: Path, text: str, message: str) -> None:
    manifest.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        listed(manifest)
    assert "\n" not in str(caught.value)


def test_groups_come_from_the_path(tmp_path: Path) -> None:
    for person in ("ann", "bob"):
        for i in range(2):
            picture(tmp_path / "good" / f"{person}_{i}.png")
    picture(tmp_path / "good" / "nobody.png")
    listing = listed(tmp_path, group=r"([a-z]+)_\d")
    assert [item.group for item in listing.items] == ["ann", "ann", "bob", "bob", None]
    assert listing.notes == ("data.group does not match 1 picture; each stands alone",)
    with pytest.raises(DataError, match=r"matches no picture, not even good/ann_0\.png"):
        listed(tmp_path, group=r"(x)y")


def test_one_part_alone_is_no_official_part_any_more(tmp_path: Path) -> None:
    items = listed(mvtec(tmp_path), part="test").items
    assert len(items) == 5
    assert all(item.split is None for item in items)


@pytest.mark.parametrize("data", [{"group": "(unclosed"}, {"group": "no capture"}, {"normal": []}, {"normal": [" "]}])
def test_impossible_specs_die_when_read(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DataSpec.parse(data)


def test_numbers_are_names_too() -> None:
    assert DataSpec.parse({"normal": [0, 1]}).normal == ("0", "1")
    assert DataSpec.parse({"normal": "fine"}).normal == ("fine",)
