import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from commands import call_on_two_processes
from networks import small_data, small_net
from torch.testing import assert_close

from bnnft.metrics import Histogram
from bnnft.metrics.meter import Meter


def measured(model, parts):
    meter = Meter(model)
    for x, y in parts:
        with meter.watch(), torch.no_grad():
            model(x)
        meter.importance(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
    return {
        layer: {name: tuple(v) if isinstance(v, Histogram) else v for name, v in values.items()}
        for layer, values in meter.results().items()
    }


def batches():
    x, y = small_data().tensors
    return list(zip(x.split(8), y.split(8), strict=True))


def measure_in_process(rank, folder, shares):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        first = shares[0]
        own = batches()[:first] if rank == 0 else batches()[first : first + shares[1]]
        torch.save(measured(small_net().eval(), own), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [(6, 0), (0, 6), (2, 4)])
def test_two_processes_measure_what_one_does_also_where_one_has_no_data(tmp_path, shares):
    call_on_two_processes(measure_in_process, tmp_path, shares)
    expected = measured(small_net().eval(), batches())
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results.keys() == expected.keys()
        for layer, values in expected.items():
            assert results[layer].keys() == values.keys()
            for name, value in values.items():
                assert_close(results[layer][name], value, check_dtype=False, rtol=1e-4, atol=1e-6)
