"""The transfer study: its configs are valid, and its table is the mean over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import transfer

PAIRS = [(name, encoder) for name in transfer.OBJECTIVES for encoder in transfer.ONLY.get(name, transfer.ENCODERS)]


@pytest.mark.parametrize(("objective", "encoder"), PAIRS)
def test_every_pair_of_the_tables_is_a_config(objective, encoder):
    cfg = transfer.config(objective, encoder, 2, Path("images"), Path("out"), 50)
    trained = "simmim" if objective == "visible" else objective
    assert (cfg.objective.name, cfg.model.name, cfg.train.seed) == (trained, encoder, 2)
    assert cfg.train.steps == 50 and cfg.optim.warmup_steps == 5


def test_the_table_is_the_mean_and_deviation_over_seeds():
    common = dict(encoder="vit", pool="cls", rankme=5, linear=90, steps=7, cpu_seconds=3.5)
    rows = [dict(common, objective="ibot", knn20=k) for k in (50, 53)]
    rows.append(dict(common, objective="untrained", knn20="40.0", steps="", cpu_seconds=""))
    assert transfer.table(rows).splitlines()[2:] == [
        "| vit | ibot | cls | 2 | 7 | 3.5 | 51.5 ± 2.1 | 90.0 ± 0.0 | 5.0 ± 0.0 |",
        "| vit | untrained | cls | 1 | – | – | 40.0 | 90.0 | 5.0 |",
    ]
