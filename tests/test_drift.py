"""What drift alarms promise: fair evidence, few false alarms with calibration redrawn, and the right one speaking."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from anomaly_vae.calibration import Calibration, rank_allowed
from anomaly_vae.drift import (
    BLOCK,
    EVIDENCE,
    LEAST_EFFECT,
    RateAlarm,
    Reference,
    ShiftAlarm,
    noise,
    tolerated_rate,
    widest,
)

NAMES = tuple(f"part {i}" for i in range(12))


def evidence_of(outliers, tolerated):
    alarm = RateAlarm(tolerated)
    alarm.update(outliers)
    return alarm.evidence


# --- the rate alarm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerated", [0.001, 0.05, 0.5, 0.9])
def test_evidence_is_a_martingale_at_the_tolerated_rate_and_shrinks_below_it(tolerated):
    streams = list(itertools.product((False, True), repeat=8))
    found = {stream: evidence_of(stream, tolerated) for stream in streams}
    for rate in (tolerated, tolerated / 2, tolerated / 10):
        chances = [rate ** sum(stream) * (1 - rate) ** (8 - sum(stream)) for stream in streams]
        mean = sum(chance * found[stream] for chance, stream in zip(chances, streams, strict=True))
        assert mean == pytest.approx(1.0, rel=1e-9) if rate == tolerated else mean < 1
    above = min(0.99, 2 * tolerated)
    assert sum(above ** sum(s) * (1 - above) ** (8 - sum(s)) * found[s] for s in streams) > 1


def test_evidence_stays_fair_whatever_came_before():
    """As a supermartingale: given any past, the mean of the next evidence is the present one."""
    random = np.random.default_rng(0)
    for _ in range(20):
        past = random.random(random.integers(300)) < 0.1
        ahead = [evidence_of([*past, more], 0.04) for more in (False, True)]
        assert 0.96 * ahead[0] + 0.04 * ahead[1] == pytest.approx(evidence_of(past, 0.04), rel=1e-9)


@pytest.mark.parametrize(("n", "alpha", "mode"), [(99, 0.01, "average"), (200, 0.05, "average"),
                                                  (400, 0.01, "guaranteed")])  # fmt: skip
def test_false_alarms_are_rarer_than_promised_with_calibration_redrawn(n, alpha, mode):
    """Streams of 5,000 normals; scores uniform without loss of generality, ties included."""
    random, k, raised, naive = np.random.default_rng(1), rank_allowed(n, alpha, mode), 0, 0
    for _ in range(300):
        calibration = Calibration.of([np.round(random.random(n), 4)])
        verdicts = np.round(random.random(5000), 4) > calibration.threshold(alpha, mode)
        for tolerated, wrong in ((tolerated_rate(calibration, k).rate, False), (k / (n + 1), True)):
            alarm = RateAlarm(tolerated)
            alarm.update(verdicts)
            naive += alarm.raised and wrong
            raised += alarm.raised and not wrong
    assert stats.binomtest(raised, 300, 0.01, alternative="greater").pvalue > 0.01, raised
    assert naive > raised, "taking the expected rate for the true one is not enough"


def test_the_larger_the_rise_the_sooner_it_is_found():
    random, delays = np.random.default_rng(2), []
    for rise, images in ((2, 8000), (5, 800), (20, 200)):
        found = []
        for _ in range(20):
            alarm = RateAlarm(0.02)
            alarm.update(random.random(2000) < 0.01)
            found.append(alarm.update(random.random(images) < 0.02 * rise))
        delays.append(np.median(found))
    assert delays == sorted(delays, reverse=True)
    assert delays[0] < 5000
    assert delays[2] < 40


def test_fewer_outliers_are_no_alarm_and_more_are():
    alarm = RateAlarm(0.05)
    alarm.update([False] * 20_000)
    assert not alarm.raised
    assert alarm.evidence < 1
    before = alarm.log_evidence
    alarm.update([True])
    assert alarm.log_evidence > before


def test_neither_batches_nor_a_restart_change_anything():
    random = np.random.default_rng(3)
    stream = np.concatenate([random.random(500) < 0.02, random.random(200) < 0.3])
    whole, parts = RateAlarm(0.03), RateAlarm(0.03)
    at = whole.update(stream)
    assert at is not None
    found = None
    for start in range(0, 700, 37):
        raised = parts.update(stream[start : start + 37])
        found = start + raised if raised is not None else found
        parts = RateAlarm.unpacked(json.loads(json.dumps(parts.packed())))
    assert found == at
    assert parts.log_evidence == pytest.approx(whole.log_evidence, abs=1e-9)
    assert (parts.images, parts.recent_outliers) == (whole.images, whole.recent_outliers)
    assert whole.raised
    assert whole.evidence > EVIDENCE
    assert whole.recent_outliers / whole.recent_images > 0.2, "the recent rate is that since the rise"


def test_an_alarm_stays_raised_though_evidence_sinks_again():
    alarm = RateAlarm(0.05)
    assert alarm.update([True] * 10) is not None
    assert alarm.update([False] * 2000 + [True] * 20) is None
    assert alarm.raised


def test_what_is_tolerated_follows_the_calibration_and_the_source():
    scores = np.arange(200.0)
    split, folds, groups = Calibration.of([scores]), Calibration.of([scores[::2], scores[1::2]]), None
    groups = Calibration.of([scores], groups=20)
    k = split.rank(0.05)
    plain = tolerated_rate(split, k)
    assert plain.rate == pytest.approx(stats.beta(k, 201 - k).ppf(0.995))
    assert plain.promised
    assert plain.expected == k / 201
    crossed, grouped = tolerated_rate(folds, k), tolerated_rate(groups, k)
    assert crossed.rate == pytest.approx(max(plain.rate, 2 * (k + 1) / 202))
    assert grouped.rate > plain.rate, "twenty groups tell less than 200 pictures"
    assert not crossed.promised
    assert not grouped.promised
    assert tolerated_rate(split, k, 0.001) == plain
    assert tolerated_rate(split, k, 0.3).rate == tolerated_rate(split, k, 0.3).expected == 0.3
    nothing = tolerated_rate(split, 201)
    assert nothing.rate == 1
    alarm = RateAlarm(nothing.rate)
    alarm.update([True] * 1000)
    assert not alarm.raised


# --- the shift alarm ------------------------------------------------------------------------------------------------


def normals(random, n, **moved):
    return {name: random.normal(size=n) + moved.get(name.replace(" ", "_"), 0) for name in NAMES}


@pytest.mark.parametrize("n", [60, 400])
def test_normal_streams_raise_no_shift_alarm_with_calibration_redrawn(n):
    random = np.random.default_rng(4)
    for _ in range(60):
        alarm = ShiftAlarm(Reference(normals(random, n)))
        alarm.update(normals(random, 3000))
        assert alarm.raised is None


@pytest.mark.parametrize("way", [1, -1])
def test_most_pictures_moved_is_found_named_and_signed(way):
    random, found = np.random.default_rng(5), []
    for move in (1.0, 2.0, 8.0):
        alarm = ShiftAlarm(Reference(normals(random, 400)))
        assert alarm.update(normals(random, 1000)) is None
        found.append(alarm.update(normals(random, 3000, part_3=way * move)))
        assert alarm.raised.part == "part 3"
        assert alarm.raised.effect * way >= alarm.raised.limit >= LEAST_EFFECT
    assert found == sorted(found, reverse=True), "the larger the sooner"
    assert found[-1] < 3 * BLOCK


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
def test_a_tail_that_grows_raises_the_rate_alarm_alone(share):
    random = np.random.default_rng(6)
    calibration = normals(random, 400)
    threshold = np.quantile(calibration["part 0"], 0.99)
    shift, rate = ShiftAlarm(Reference(calibration)), RateAlarm(0.025)
    stream = normals(random, 2000)
    defect = random.random(2000) < share
    for name in NAMES[:6]:
        stream[name] = np.where(defect, stream[name] + 6, stream[name])
    assert shift.update(stream) is None
    assert rate.update(stream["part 0"] > threshold) is not None


def test_scattering_to_both_sides_is_a_change_too():
    random = np.random.default_rng(7)
    alarm = ShiftAlarm(Reference(normals(random, 400)))
    stream = normals(random, 1000)
    stream["part 2"] = stream["part 2"] * 30
    assert alarm.update(stream) is not None
    assert alarm.raised.part == "part 2"


def test_ties_are_no_move():
    random = np.random.default_rng(8)

    def drawn(n):
        return {"coarse": np.round(random.normal(size=n)), "often 0": np.maximum(random.normal(size=n), 0),
                "one value": np.ones(n)}  # fmt: skip

    reference = Reference(drawn(500))
    assert reference.names == ("coarse", "often 0"), "what does not vary cannot be watched"
    alarm = ShiftAlarm(reference)
    assert alarm.update(drawn(5000)) is None
    assert max(abs(one.effect) for one in alarm.shifts()) < 0.2


def test_no_number_counts_as_unusual():
    random = np.random.default_rng(9)
    alarm = ShiftAlarm(Reference(normals(random, 400)))
    stream = normals(random, 500)
    stream["part 1"][:] = np.nan
    assert alarm.update(stream) is not None
    assert alarm.raised.part == "part 1"


def test_neither_batches_nor_a_restart_change_the_shift():
    random = np.random.default_rng(10)
    reference, stream = Reference(normals(random, 300)), normals(random, 1500, part_5=0.8)
    whole, parts, found = ShiftAlarm(reference), ShiftAlarm(reference), None
    at = whole.update(stream)
    for start in range(0, 1500, 41):
        raised = parts.update({name: values[start : start + 41] for name, values in stream.items()})
        found = start + raised if raised is not None else found
        packed = parts.packed()
        sums = packed.pop("sums").tobytes()
        packed = json.loads(json.dumps(packed)) | {"sums": np.frombuffer(sums, np.int32)}
        parts = ShiftAlarm.unpacked(reference, packed)
    assert found == at is not None
    assert parts.raised == whole.raised
    assert parts.shifts() == whole.shifts()
    anew = ShiftAlarm.unpacked(Reference({"other": np.arange(50.0)}), whole.packed())
    assert (anew.images, anew.raised) == (0, None)


def test_the_limit_falls_with_pictures_and_calibration_and_rises_with_names():
    assert noise(64, 400, 20) > noise(1024, 400, 20) > noise(1024, 2000, 20)
    assert noise(64, 400, 40) > noise(64, 400, 20)
    assert ShiftAlarm(Reference({"a": np.arange(2000.0)})).shifts() == []


def test_latents_that_differ_most_are_watched():
    codes = np.random.default_rng(11).normal(size=(100, 30)) * np.where(np.arange(30) % 10, 1, 3)
    assert widest(codes, 3) == (0, 10, 20)
    assert widest(np.zeros((0, 0))) == ()
    assert widest(np.zeros((100, 3))) == ()
