from gen.metrics.curves import logged, show_training
from gen.metrics.report import Report

RECORDS = [
    {"step": 5, "stage": "first", "seconds": 1.0, "images": 40, "loss": 4.0, "skipped": 0.0, "images_per_second": 9.0},
    {"step": 10, "stage": "first", "seconds": 2.0, "images": 80, "loss": 2.0, "skipped": 0.0, "images_per_second": 8.0},
    *(
        {"step": step, "stage": "second", "student/loss": value}
        | {"fake_score/loss": 1 / value, "fake_score/fake_loss": value, "lr": None, "done": True, "grad_norm": 2.0}
        for step, value in ((15, 0.5), (20, 0.25))
    ),
    {"step": 20, "stage": "second", "frechet": 3.25},
]


def test_every_series_is_a_line_of_its_own_and_losses_come_first() -> None:
    found = logged(RECORDS)
    assert list(found) == ["loss", "fake_loss", "skipped", "grad_norm", "frechet", "images_per_second"]
    assert found["loss"] == {
        "first": ([5.0, 10.0], [4.0, 2.0]),
        "second, student": ([15.0, 20.0], [0.5, 0.25]),
        "second, fake score": ([15.0, 20.0], [2.0, 4.0]),
    }


def test_what_a_drawing_would_not_show_stands_in_a_table() -> None:
    page = Report("x")
    show_training(page, RECORDS)
    drawings = [block for block in page.blocks if block["kind"] == "curves"]
    assert len(drawings) == 3  # loss, fake loss, speed
    assert "second, fake score" in drawings[0]["svg"]
    (table,) = (block for block in page.blocks if block["kind"] == "table")
    assert [[text for text, _ in row] for row in table["rows"]] == [
        ["skipped", "first", "at 2 steps", "0"],
        ["grad norm", "second", "at 2 steps", "2"],
        ["frechet", "second", "at step 20", "3.25"],
    ]
    empty = Report("x")
    show_training(empty, [])
    assert not empty.blocks
