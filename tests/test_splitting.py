"""Laws of dividing pictures: sizes, seeds, official parts, and that nothing which belongs together is parted."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anomaly_vae.data import MINIMUM_NORMALS, Split, folds, split
from anomaly_vae.errors import DataError
from anomaly_vae.layouts import Item
from anomaly_vae.splitting import units


@dataclass
class Table:
    """What a split looks at, without any files."""

    items: tuple[Item, ...]
    fingerprints: np.ndarray


def table(rows: list[tuple[bool, str | None, str | None]], prints: list[int] | None = None) -> Table:
    """Rows of (normal, group, split)."""
    items = tuple(
        Item(None, f"{i:05}", "good" if normal else "bad", normal, group=group, split=part)
        for i, (normal, group, part) in enumerate(rows)
    )
    return Table(items, np.array(prints or range(len(rows)), np.uint64))


def parts_of(result: Split) -> dict[str, np.ndarray]:
    return {name: getattr(result, name) for name in ("train", "fit", "calibrate", "test_normal", "test_abnormal")}


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 400), st.integers(0, 2**32 - 1), st.floats(0.05, 0.5))
def test_single_pictures_are_divided_to_size(n: int, seed: int, test_fraction: float) -> None:
    pictures = table([(True, None, None)] * n + [(False, None, None)] * 5)
    result = split(pictures, seed=seed, test_fraction=test_fraction)
    parts = parts_of(result)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(n + 5))
    assert parts["test_abnormal"].tolist() == list(range(n, n + 5))
    assert abs(len(parts["test_normal"]) - test_fraction * n) <= 1
    pool = len(result.pool)
    for name, share in (("fit", 0.15), ("calibrate", 0.25), ("train", 0.6)):
        assert abs(len(parts[name]) - share * pool) <= 2
        assert len(parts[name]) >= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=60, max_size=200), st.integers(0, 1000), st.data())
def test_no_unit_straddles_two_parts(groups: list[int], seed: int, data: st.DataObject) -> None:
    n = len(groups)
    assume(len(set(groups)) >= 8)
    prints = [min(i, data.draw(st.integers(0, 400))) if i % 9 == 0 else 1000 + i for i in range(n)]
    rows = [(data.draw(st.integers(0, 5)) > 0, f"g{group}" if group else None, None) for group in groups]
    pictures = table(rows, prints)
    normal = [i for i, row in enumerate(rows) if row[0]]
    assume(len(normal) >= MINIMUM_NORMALS)
    # Chains of equal pictures can leave too few units.
    assume(len(np.unique(units(pictures.items, pictures.fingerprints)[normal])) >= 8)
    result = split(pictures, seed=seed)
    pool = set(result.pool.tolist())
    test = set(result.test_normal.tolist()) | set(result.test_abnormal.tolist())
    assert not pool & test
    sides = {name: set(parts.tolist()) for name, parts in parts_of(result).items()}
    for column in ([row[1] for row in rows], prints):
        for value in set(column) - {None}:
            members = {i for i in range(n) if column[i] == value}
            used = [name for name, side in sides.items() if members & side]
            assert len(used) <= 1 or set(used) == {"test_normal", "test_abnormal"}
    assert set(normal) == pool | set(result.test_normal.tolist())


def test_groups_keep_sizes_close_to_the_fractions() -> None:
    rows = [(True, f"g{i // 5}", None) for i in range(500)]
    result = split(table(rows), seed=1, test_fraction=0.2)
    assert abs(len(result.test_normal) - 100) <= 5
    assert abs(len(result.calibrate) - 100) <= 10
    assert abs(len(result.fit) - 60) <= 10


def test_a_split_is_decided_by_its_seed() -> None:
    pictures = table([(True, None, None)] * 100)
    one, same, other = (parts_of(split(pictures, seed=seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["test_normal"], other["test_normal"])


def test_redrawing_calibration_keeps_the_test() -> None:
    pictures = table([(True, f"g{i // 2}", None) for i in range(100)])
    one, other = split(pictures, seed=3), split(pictures, seed=3, redraw=1)
    assert np.array_equal(one.test_normal, other.test_normal)
    assert not np.array_equal(one.calibrate, other.calibrate)


def test_official_parts_are_kept() -> None:
    rows = [(True, None, "train")] * 40 + [(True, None, "test")] * 10 + [(False, None, "test")] * 7
    rows += [(False, None, "train")] * 3 + [(True, None, None)] * 5
    result = split(table(rows), seed=0, test_fraction=0.5)
    assert result.test_normal.tolist() == list(range(40, 50))
    assert result.test_abnormal.tolist() == list(range(50, 57))
    assert result.pool.tolist() == [*range(40), *range(60, 65)]


def test_without_official_test_normals_some_are_held_out() -> None:
    rows = [(True, None, "train")] * 40 + [(False, None, "test")] * 7
    result = split(table(rows), seed=0, test_fraction=0.25)
    assert len(result.test_normal) == 10
    assert len(result.test_abnormal) == 7
    assert len(split(table(rows), seed=0, test_fraction=0).test_normal) == 0


def test_abnormal_pictures_of_training_groups_are_not_tested() -> None:
    """The same people, neutral and smiling: nobody of the training is in the test."""
    people = [f"p{i}" for i in range(50)]
    pictures = table([(True, p, None) for p in people] + [(False, p, None) for p in people])
    result = split(pictures, seed=0)
    assert {i - 50 for i in result.test_abnormal.tolist()} == set(result.test_normal.tolist())


@pytest.mark.parametrize("n", [0, 1, 15])
def test_too_few_normals_say_how_many_it_takes(n: int) -> None:
    rows = [(True, None, "train")] * n + [(True, None, "test")] * 50 + [(False, None, None)] * 50
    with pytest.raises(DataError, match=f"at least 16 .*add {16 - n} or more"):
        split(table(rows), seed=0)


def test_sixteen_normals_are_enough_and_two_groups_are_not() -> None:
    assert all(len(part) for part in list(parts_of(split(table([(True, None, None)] * 16), seed=0)).values())[:4])
    with pytest.raises(DataError, match="at least"):
        split(table([(True, f"g{i % 2}", None) for i in range(40)]), seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=60, max_size=150))
def test_folds_are_a_partition_that_no_group_straddles(k: int, groups: list[int | None]) -> None:
    indices = np.arange(len(groups)) * 3 + 1
    assume(len(set(groups)) >= k)
    parts = folds(indices, groups, k, seed=5)
    assert len(parts) == k
    assert sorted(np.concatenate(parts)) == indices.tolist()
    home = {int(i): number for number, part in enumerate(parts) for i in part}
    for group in set(groups) - {None}:
        assert len({home[int(i)] for i, own in zip(indices, groups, strict=True) if own == group}) == 1
    largest = max(Counter(group for group in groups if group is not None).values(), default=1)
    assert max(map(len, parts)) - min(map(len, parts)) <= largest


def test_units_join_groups_by_common_pictures() -> None:
    rows = [(True, "a", None), (True, "a", None), (True, "b", None), (True, None, None), (True, None, None)]
    unit = units(table(rows, [1, 2, 2, 3, 3]).items, np.array([1, 2, 2, 3, 3], np.uint64))
    assert unit[0] == unit[1] == unit[2]
    assert unit[3] == unit[4] != unit[0]
