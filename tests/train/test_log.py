"""The log is cut back exactly, reads back to the last bit, and is drawn."""

import json

from danlu.train.log import LOG, PLOT, TIMINGS, TrainLog, draw_loss, finite, read_log


def test_lines_after_a_step_and_cut_lines_go(tmp_path) -> None:
    log = TrainLog(tmp_path)
    for step in (1, 2, 3):
        log.write(LOG, {"step": step, "loss": step / 3})
        log.write(TIMINGS, {"step": step, "seconds": 0.1})
    log.write(LOG, {"step": 2, "eval_loss": 0.5})
    with open(tmp_path / LOG, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    log.truncate(2)
    assert read_log(tmp_path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 2, "eval_loss": 0.5}]
    assert len((tmp_path / TIMINGS).read_text(encoding="utf-8").splitlines()) == 2
    log.truncate(0)
    assert read_log(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path) -> None:
    log = TrainLog(tmp_path / "none", active=False)
    log.write(LOG, {"step": 1})
    log.truncate(0)
    log.sync()
    log.remove_waste()
    assert not (tmp_path / "none").exists()


def test_numbers_survive_to_the_last_bit(tmp_path) -> None:
    values = [0.1 + 0.2, 1e-300, 3.9205787295386907, 2**0.5]
    TrainLog(tmp_path).write(LOG, {"step": 1, "values": values})
    assert read_log(tmp_path)[0]["values"] == values
    assert finite(float("nan")) is None and finite(float("inf")) is None and finite(0.5) == 0.5


def test_waste_of_an_interrupted_cut_is_removed(tmp_path) -> None:
    (tmp_path / f".{LOG}.123.tmp").write_text("half", encoding="utf-8")
    TrainLog(tmp_path).remove_waste()
    assert not list(tmp_path.iterdir())


def test_the_plot_is_a_picture_and_the_same_every_time(tmp_path) -> None:
    log = TrainLog(tmp_path)
    draw_loss(tmp_path)
    assert not (tmp_path / PLOT).exists()  # there is no log yet
    log.write(LOG, {"step": 1, "loss": None, "skipped": True})
    draw_loss(tmp_path)
    assert not (tmp_path / PLOT).exists()  # and here none of its lines holds a number
    for step in range(2, 30):
        log.write(LOG, {"step": step, "loss": 5 / step})
    log.write(LOG, {"step": 15, "eval_loss": 0.4})
    draw_loss(tmp_path)
    first = (tmp_path / PLOT).read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    draw_loss(tmp_path)
    assert (tmp_path / PLOT).read_bytes() == first


def test_a_line_is_one_json_object(tmp_path) -> None:
    TrainLog(tmp_path).write(LOG, {"step": 1, "loss/中文": 1.5})
    lines = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss/中文": 1.5}]
