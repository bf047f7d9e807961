from petals_tune.service.tuning.metrics import read_curves, read_rows

TEXT = """epoch,step,swarm/sent_mb,train/loss,val/loss
0,0,1.5,,4.0
0,0,2.5,3.5,
0,1,2.5,nan,
0,2,,,inf
"""


def test_rows_become_events_with_the_steps_that_were_done(tmp_path):
    file = tmp_path / "metrics.csv"
    assert list(read_rows(file)) == []
    file.write_text(TEXT)
    assert [row.event() for row in read_rows(file)] == [
        {"step": 0, "full_valid_loss": 4.0, "valid_loss": 4.0},
        {"step": 1, "train_loss": 3.5},
        {"step": 2, "train_loss": None},
        {"step": 2, "full_valid_loss": None, "valid_loss": None},
    ]
    assert [row.is_training for row in read_rows(file)] == [False, True, True, False]


def test_curves_are_those_of_the_file_and_json_can_hold_them(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(TEXT)
    assert read_curves(file) == {
        "swarm/sent_mb": [(0, 1.5), (0, 2.5), (1, 2.5)],
        "train/loss": [(0, 3.5), (1, None)],
        "val/loss": [(0, 4.0), (2, None)],
    }


def test_a_file_may_be_cut_anywhere_while_it_is_written(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(TEXT)
    whole = list(read_rows(file))
    for size in range(len(TEXT)):
        file.write_text(TEXT[:size])
        rows = list(read_rows(file))
        assert rows == whole[: len(rows)]
