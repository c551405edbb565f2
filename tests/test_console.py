"""What people see: one bar a model, and sentences that say what is promised."""

import io
from pathlib import Path

from conftest import TINY
from rich.console import Console
from rich.progress import Progress

from anomaly_vae import Engine
from anomaly_vae.bundle import Bundle
from anomaly_vae.console import TrainingView, evaluation_table, kinds_table, policy_line, verdict_table
from anomaly_vae.describing import bundle_facts, facts_table
from anomaly_vae.evaluation import evaluate
from anomaly_vae.fitting import Progress as Epoch


def shown(thing):
    console = Console(file=io.StringIO(), width=160)
    console.print(thing)
    return console.file.getvalue()


def epoch(number):
    return Epoch(number, 3, -10.0, -12.0, 2.0, float("nan") if number == 1 else -9.0, 100.0)


def test_one_bar_a_model():
    with Progress(console=Console(file=io.StringIO())) as bar:
        view = TrainingView(bar)
        for member in (0, 1):
            for number in (1, 2, 3):
                view(member, 2, epoch(number))
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("model 1/2", 3, 3),
            ("model 2/2", 3, 3),
        ]
        assert "held-out -9.0" in bar.tasks[0].fields["losses"]


def test_plain_lines_where_there_is_no_terminal(capsys):
    view = TrainingView(None)
    for number in (1, 2, 3):
        view(0, 1, epoch(number))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training  epoch 1/3  loss -10.0  reconstruction -12.0  KL 2.0  100 images/s")
    assert lines[-1].startswith("training  epoch 3/3")


def test_what_a_course_does_not_compute_is_not_shown_and_costs_have_their_names(capsys):
    nan = float("nan")
    TrainingView(None)(0, 1, Epoch(1, 1, -10.0, nan, nan, nan, 100.0, "penalty"))
    TrainingView(None)(0, 1, Epoch(1, 1, -10.0, -12.0, 0.5, nan, 100.0, "Jacobian"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "training  epoch 1/1  loss -10.0  100 images/s"
    assert second == "training  epoch 1/1  loss -10.0  reconstruction -12.0  Jacobian 0.5  100 images/s"


def test_info_shows_what_is_unusual_and_nothing_else(tiny_detector):
    usual = bundle_facts(tiny_detector, Bundle({}, {}, {}))
    text = shown(facts_table(Path("bundle"), usual))
    assert not any(word in text for word in ("law of z", "classes", "objective"))
    spec = TINY.with_overrides(
        ["model.latent={kind: mixture, beta: 0.5, components: 3}", "model.condition={classes: [cat, dog]}",
         "model.critic={}", "objective.adversary={weight: 2.0}", "objective.loss={kind: mse, weight: 50}",
         "objective.corruption=[{kind: noise, sigma: 0.1}]", "objective.encoder_steps=3", "training.select=last"]
    )  # fmt: skip
    text = shown(facts_table(Path("bundle"), usual | {"spec": spec.model_dump(mode="json")}))
    for line in (
        "mixture, beta 0.5, components 3",
        "2 (cat, dog), marginalised",
        "loss mse, weight 50.0; corruption by noise; adversary, weight 2.0; 3 encoder steps more; critic of pictures",
    ):
        assert line in text


def test_the_policy_is_one_sentence_that_names_its_numbers(tiny_detector):
    line = policy_line(tiny_detector)
    assert line.startswith("alpha 0.01 (average) from 144 calibration images: expect 0.69% false alarms (90% band")


def test_tables_say_what_was_measured(tiny_detector, digits_folder):
    evaluation = evaluate(Engine(tiny_detector, "cpu"), digits_folder)
    text = shown(evaluation_table(evaluation))
    assert f"{evaluation.quality.auroc:.4f}" in text
    assert "144 / 1077" in text
    assert ("as promised" in text) == evaluation.alarms_as_promised
    kinds = shown(kinds_table(evaluation))
    assert all(f"│ {digit} " in kinds for digit in "456789")


def test_an_unreadable_picture_is_a_row_with_its_reason():
    text = shown(verdict_table([{"path": "a.png", "error": "the PNG ends before its last pixel"}]))
    assert "unreadable" in text
    assert "ends before" in text
