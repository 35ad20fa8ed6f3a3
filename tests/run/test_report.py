"""The rows of a run's table."""

import pytest
from test_devft_config import stage_config

from hf_devft.run.report import table_rows
from hf_devft.run.tables import ALL


def finished(stage: int, epsilon: float):
    totals = {"bytes": 10.0, "flops": 5.0, "seconds": 3.0, "peak_memory": 100.0 * stage, "epsilon": epsilon}
    return stage_config(stage=stage, rounds_done=4, totals=totals, metrics={"eval_loss": 1.0, "eval_full_loss": 2.0})


def test_a_total_comes_after_the_last_of_several_stages():
    first, last = finished(1, 0.5), finished(2, 0.8)
    assert [row.stage for row in table_rows([first], None)] == [1]
    assert [row.stage for row in table_rows([first], {"eval_full_loss": 9.0})] == [0, 1]
    *_, total = table_rows([first, last], None)
    assert (total.stage, total.rounds_done) == (ALL, 8)
    assert total.totals == {"bytes": 20, "flops": 10, "seconds": 6, "peak_memory": 200, "epsilon": 0.8}
    assert total.metrics == {"eval_full_loss": 2.0}
    assert table_rows([stage_config(num_stages=1)], None)[-1].stage == 1


@pytest.mark.parametrize("start", [None, {"eval_full_loss": 9.0}])
def test_records_stay_as_they_are(start):
    first, last = finished(1, 0.5), finished(2, 0.8)
    table_rows([first, last], start)
    assert (first, last) == (finished(1, 0.5), finished(2, 0.8))
