"""What is counted while tokens run, layer by layer."""

import numpy as np

from runtime.counters import LAYER_FIGURES, Counters


def by_name(layers):
    return {name: column.tolist() for name, column in zip(LAYER_FIGURES, layers.T, strict=True)}


def test_sums_fall_to_the_layer_that_ended():
    counters = Counters(layers=3, experts=4)
    for _ in range(2):
        counts = counters.fresh()
        for layer, (rows, waited) in enumerate([(4, 0.0), (2, 0.5)], start=1):  # a segment of layers 1 and 2
            counts.count_layer(layer, np.arange(4), tokens=2, remote_rows=4 - rows, remote_tokens=int(rows < 4))
            counts.tier_rows["device"] = counts.tier_rows.get("device", 0) + rows
            counts.wait_s += waited
            counts.remote_calls += waited > 0
            counts.end_layer(layer)
        counts.count_replaced(2, 1)
        counters.add(counts)
    found = counters.snapshot()
    assert by_name(found.layers) == {
        "tokens": [0, 4, 4],
        "device_rows": [0, 8, 4],
        "host_rows": [0, 0, 0],
        "disk_rows": [0, 0, 0],
        "remote_rows": [0, 0, 4],
        "calls": [0, 0, 2],
        "local_s": [0, 0, 0],
        "wait_s": [0, 0, 1.0],
        "replaced_rows": [0, 0, 2],
    }
    assert (found.replaced_rows, found.wait_s) == (2, 1.0)
    found.layers += 1
    assert counters.snapshot().layers[0].sum() == 0
