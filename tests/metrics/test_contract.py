"""What every metric keeps: any split, merge, process, reset, copy and keyword gives the same numbers."""

import inspect
import pickle

import pytest
import torch
import torch.distributed
from commands import call_on_two_processes
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch.testing import assert_close
from torchmetrics import MetricCollection

from bnnft.metrics import ClassMargin, Histogram, ImportanceVariance, Margin

METRICS = [Margin, ClassMargin, ImportanceVariance]
SPLITS = [[12], [1] * 12, [5, 7], [7, 5], [3, 1, 6, 2]]
THRESHOLDS = torch.tensor([0.3, -torch.inf, -2.6, 1.1])

every_metric = pytest.mark.parametrize("kind", METRICS)


def batches(kind, split):
    """Return the keywords of one update a batch, for the same 12 samples however they are split."""
    generator = torch.Generator().manual_seed(0)
    if kind is Margin:
        values = 6 * torch.randn(12, 4, 3, generator=generator)
        return [{"preactivations": part, "thresholds": THRESHOLDS, "fan_in": 25} for part in values.split(split)]
    if kind is ClassMargin:
        values = torch.randint(-20, 21, (12, 5), generator=generator).float()
        return [{"scores": part, "fan_in": 20} for part in values.split(split)]
    return [{"importance": part} for part in torch.rand(12, 7, generator=generator).split(split)]


def filled(kind, split=(12,)):
    metric = kind()
    for batch in batches(kind, split):
        metric.update(**batch)
    return metric


def assert_same(got, expected):
    """Integers and histograms are equal, floats close."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Histogram):
            assert torch.equal(got[name].counts, value.counts)
            assert torch.equal(got[name].edges, value.edges)
        else:
            assert_close(got[name], value, check_dtype=False)


@every_metric
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_into_batches_gives_the_same(kind, split):
    assert_same(filled(kind, split).compute(), filled(kind).compute())


def merged(kind, split):
    """Return one metric that took in the first batch and the states of one metric for each other batch."""
    first, *others = (filled_with(kind, batch) for batch in batches(kind, split))
    for other in others:
        first.merge_state(other)
    return first


def filled_with(kind, batch):
    metric = kind()
    metric.update(**batch)
    return metric


@every_metric
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_merged_states_give_the_same(kind, split):
    assert_same(merged(kind, split).compute(), filled(kind).compute())


@every_metric
def test_merged_metric_takes_in_more(kind):
    metric = merged(kind, [3, 9])
    again = batches(kind, [12])[0]
    metric.update(**again)
    expected = filled(kind)
    expected.update(**again)
    assert_same(metric.compute(), expected.compute())


@every_metric
def test_forward_returns_the_batch_and_takes_it_in(kind):
    metric = kind()
    for batch in batches(kind, [3, 1, 6, 2]):
        assert_same(metric(**batch), filled_with(kind, batch).compute())
    assert_same(metric.compute(), filled(kind).compute())


def measure_in_process(rank, folder):
    """Take in one of two unequal parts, let compute() merge the processes, and save what this process got."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        results = {}
        for kind in METRICS:
            metric = kind()
            parts = batches(kind, [4, 3, 5])
            for batch in parts[:2] if rank == 0 else parts[2:]:
                metric.update(**batch)
            merged = {name: tuple(v) if isinstance(v, tuple) else v for name, v in metric.compute().items()}
            results[kind.__name__] = merged, int(metric.count)  # compute() gives the process its own state back
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_parts_compute_what_one_does(tmp_path):
    call_on_two_processes(measure_in_process, tmp_path)
    for rank, samples in ((0, 7), (1, 5)):
        results = torch.load(tmp_path / f"{rank}.pt")
        for kind in METRICS:
            merged, count = results[kind.__name__]
            got = {n: Histogram(*v) if isinstance(v, tuple) else v for n, v in merged.items()}
            assert_same(got, filled(kind).compute())
            assert count == samples * (9 if kind is Margin else 1)  # three alive neurons at three positions


@pytest.mark.parametrize("kind", [Margin, ClassMargin, ImportanceVariance])
def test_states_keep_their_shapes_whatever_is_merged(kind):
    """Processes can only be merged where their states have the same shapes."""
    metric, merging = kind(), merged(kind, [3, 1, 6, 2])
    for batch in batches(kind, [3, 1, 6, 2]):
        metric(**batch)
    shapes = [{name: state.shape for name, state in m.metric_state.items()} for m in (filled(kind), metric, merging)]
    assert shapes[0] == shapes[1] == shapes[2]


@every_metric
def test_reset_forgets_everything(kind):
    metric = filled(kind)
    metric.reset()
    for batch in batches(kind, [5, 7])[1:]:
        metric.update(**batch)
    assert_same(metric.compute(), filled_with(kind, batches(kind, [5, 7])[1]).compute())


@every_metric
@pytest.mark.parametrize("copy", [lambda metric: pickle.loads(pickle.dumps(metric)), lambda metric: metric.clone()])
def test_copy_goes_on_by_itself(kind, copy):
    first, second = batches(kind, [5, 7])
    metric = filled_with(kind, first)
    copied = copy(metric)
    copied.update(**second)
    assert_same(copied.compute(), filled(kind).compute())
    assert_same(metric.compute(), filled_with(kind, first).compute())


@every_metric
def test_updates_keep_no_graph_and_leave_their_arguments_alone(kind):
    metric = kind()
    for batch in batches(kind, [5, 7]):
        tensors = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        metric.update(**tensors)
        assert all(torch.equal(tensors[k], v) for k, v in batch.items() if isinstance(v, torch.Tensor))
    assert not any(state.requires_grad for state in metric.metric_state.values())


@every_metric
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_another_float_type_are_taken_in(kind, dtype):
    metric, rounded = kind(), kind()
    for batch in batches(kind, [5, 7]):
        cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in batch.items()}
        metric.update(**cast)
        rounded.update(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in cast.items()})
    assert_same(metric.compute(), rounded.compute())


@every_metric
def test_states_go_to_double_precision_and_to_other_devices(kind):
    metric = filled(kind, [5, 7])
    metric.set_dtype(torch.float64)
    metric.update(**batches(kind, [12])[0])
    expected = filled(kind, [12])
    expected.update(**batches(kind, [12])[0])
    assert_same(metric.compute(), expected.compute())
    metric.to("meta")
    assert {state.device.type for state in metric.metric_state.values()} == {"meta"}


@every_metric
def test_counters_are_integers_of_64_bits(kind):
    floats = {"mean", "m2", "total"}
    types = {name: state.dtype for name, state in filled(kind).metric_state.items() if name not in floats}
    assert types
    assert set(types.values()) == {torch.int64}


def test_collection_hands_each_metric_its_keywords():
    collection = MetricCollection([kind() for kind in METRICS])
    everything = {name: value for kind in METRICS for name, value in batches(kind, [12])[0].items()}
    for _ in range(2):
        collection.update(**everything, unknown=None)
    expected = {}
    for kind in METRICS:
        keywords = {name: everything[name] for name in inspect.signature(kind.update).parameters if name != "self"}
        metric = kind()
        for _ in range(2):
            metric.update(**keywords)
        expected.update(metric.compute())
    assert_same(collection.compute(), expected)


# figures


@every_metric
@pytest.mark.parametrize("given", [False, True])
def test_plot_returns_figure_and_labelled_axes(kind, given):
    figures = pyplot.get_fignums()
    ax = Figure().add_subplot() if given else None
    figure, axes = filled(kind).plot(ax=ax)
    assert axes.get_figure() is figure
    assert ax is None or axes is ax
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert pyplot.get_fignums() == figures


@pytest.mark.parametrize(("kind", "name"), [(Margin, "margin"), (ClassMargin, "class_margin")])
def test_plot_shows_histogram_and_mean(kind, name):
    result = filled(kind).compute()
    _, axes = kind().plot(result)
    (stairs,) = axes.patches
    values, edges, _ = stairs.get_data()
    histogram = result[f"{name}_histogram"].trimmed()
    assert values.tolist() == pytest.approx((histogram.counts / histogram.counts.sum()).tolist())
    assert edges.tolist() == pytest.approx(histogram.edges.tolist())
    assert axes.lines[0].get_xdata() == pytest.approx([result[name].item()] * 2)


def test_plot_shows_importances_in_order():
    result = filled(ImportanceVariance).compute()
    _, axes = ImportanceVariance().plot(result)
    expected = sorted(result["neuron_importance"].tolist(), reverse=True)
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(expected)


@every_metric
def test_plot_takes_what_compute_returned(kind):
    metric = filled(kind)
    assert metric.plot(metric.compute())[1].get_xlabel()


@pytest.mark.parametrize(
    ("kind", "marks", "axes_names"),
    [
        (Margin, ["mean {margin:.3g}", "one flip 2"], ("margin |s - T|", "share of values")),
        (ClassMargin, ["mean {class_margin:.3g}"], ("class margin", "share of values")),
        (ImportanceVariance, ["mean"], ("neuron, most important first", "importance")),
    ],
)
def test_plot_names_what_it_shows_and_marks(kind, marks, axes_names):
    metric = filled(kind)
    result, axes = metric.compute(), metric.plot()[1]
    values = {name: value.item() for name, value in result.items() if name in ("margin", "class_margin")}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [mark.format(**values) for mark in marks]
    assert (axes.get_xlabel(), axes.get_ylabel()) == axes_names
