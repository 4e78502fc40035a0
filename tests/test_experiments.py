"""Every table, run small from end to end, and its parts: cells, resuming, gradient shares, the page."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import quick_cells
import torch
import yaml

from rkl.cli import main
from rkl.config import Config, to_plain
from rkl.distill import LossWeights
from rkl.ignored import check_ignored
from rkl.network.model import ResNetKL
from rkl.paper import cells, experiments, latency, records, tables
from rkl.paper.compute import macs
from rkl.paper.experiments import experiment
from rkl.paper.gradients import gradient_norms, shares
from rkl.paper.rows import FACTORS, ROWS, TABLES, Row, Table
from rkl.training.checkpoint import RunError

pytestmark = pytest.mark.xdist_group("experiments")  # one worker, so that the pass below runs once


def test_one_worker_runs_this_file(request):
    """pytest-xdist knows a group by what it puts behind a test's name."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("one process runs all tests, or pytest-xdist without --dist loadgroup")
    assert request.node.nodeid.endswith("@experiments")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One smoke pass over all tables on the embedded data. Rows that tables share are trained once."""
    out = tmp_path_factory.mktemp("experiments")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "train_cell", quick_cells.without_plots)
        for table in TABLES:
            experiments.run(experiment(table, "smoke", out, data="digits", image_size=16), announce=said.append)
    return out, said


@pytest.fixture(scope="module")
def page(finished):
    """The page of that pass. Each latency is measured in two passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 2)
        return tables.write(finished[0]).read_text()


def test_every_row_of_every_table_is_trained(finished):
    out, said = finished
    for table in TABLES:
        record = json.loads((out / f"{table}-digits.json").read_text())
        assert list(record["rows"]) == list(TABLES[table].rows)
        for runs in record["rows"].values():
            metrics = json.loads((out / runs[0] / "metrics.json").read_text())
            assert metrics["test_images"] == 30
    assert sum(line.endswith("done") for line in said) == len(ROWS)


def test_rows_may_be_trained_apart(finished):
    plan = experiment("table5", "smoke", finished[0], data="digits", image_size=16)
    said = []
    experiments.run(plan, announce=said.append, only=["ResNet", "ResNet-KL"])
    assert said == ["Table V on digits: 2 runs, 2 done before"]
    assert list(json.loads(plan.record.read_text())["rows"]) == list(TABLES["table5"].rows)
    with pytest.raises(ValueError, match=r"rows must be of table5's: ResNet, .*; got 'VGG'"):
        experiments.run(plan, only=["VGG"])


def test_fewer_seeds_leave_the_runs_of_more_on_the_page(tmp_path, monkeypatch):
    """The page is made from the record alone."""
    monkeypatch.setattr(cells, "in_own_process", lambda *_, **__: None)
    plan = experiment("table5", "smoke", tmp_path, data="digits", image_size=16)
    for seeds, rows, listed in ((3, None, 3), (2, ["ResNet-KL"], 3), (4, ["ResNet"], 4)):
        experiments.run(replace(plan, seeds=seeds), announce=lambda _: None, only=rows)
        runs = json.loads(plan.record.read_text())["rows"]
        assert {len(of_row) for of_row in runs.values()} == {listed}
        assert runs["ResNet"][listed - 1] == f"runs/digits/resnet/seed-{listed - 1}"
    plan.record.write_text("[]")
    with pytest.raises(RunError, match="must be a record of `rkl experiments`, got a damaged one"):
        experiments.run(plan)


def test_finished_cells_are_not_trained_again(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    said = []
    experiments.run(experiment("table5", "smoke", out, data="digits", image_size=16), announce=said.append)
    assert said == [f"Table V on digits: {len(TABLES['table5'].rows)} runs, {len(TABLES['table5'].rows)} done before"]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}


def test_no_two_data_sets_share_a_folder(tmp_path):
    names = ["folder:d/猫", "folder:d/犬", "folder:d", "folder:data_1", "folder:data-1", "folder:Data-1", "cifar10"]
    plans = [experiment("table5", "smoke", tmp_path, data=name) for name in names]
    assert len({plan.folder("ResNet", 0) for plan in plans}) == len({plan.record for plan in plans}) == len(names)
    assert plans[-1].folder("ResNet", 0) == tmp_path / "runs" / "cifar10" / "resnet" / "seed-0"
    assert all(name.isascii() for plan in plans for name in plan.folder("ResNet", 0).relative_to(tmp_path).parts)


def test_settings_of_our_networks_are_not_given_to_baselines(tmp_path):
    given = {"depth": 34, "gate": "legacy", "width": 16, "exit_gate": "none", "loss": {"beta": 0.5}}
    plan = experiment("table2", "smoke", tmp_path, data="digits", image_size=16, **given)
    ours, plain, theirs = (plan.config(row, 0) for row in ("ResNet-KL", "ResNet", "VGG"))
    assert (ours.depth, ours.gate, ours.width, ours.exit_gate, ours.loss.beta) == (34, "legacy", 16, "none", 0.5)
    assert (plain.depth, plain.gate, plain.width, plain.exit_gate) == (34, "legacy", 16, "light"), "it has no heads"
    assert (theirs.depth, theirs.gate, theirs.width, theirs.exit_gate) == (18, None, 16, "light")
    for config in (plain, theirs):
        assert config.loss == LossWeights()
        check_ignored(config)


def test_other_settings_do_not_mix_into_a_folder(finished):
    with pytest.raises(RunError, match=r"holds a run with image_size 16, want 20; give another out"):
        experiments.run(experiment("table5", "smoke", finished[0], data="digits", image_size=20))


def test_a_cell_that_lacks_its_gradients_is_finished_with_its_own_settings_alone(finished, tmp_path):
    """Its process died after it wrote metrics.json, and the command may be repeated with other settings."""
    plan = experiment("table5", "smoke", finished[0], data="digits", image_size=16)
    shutil.copytree(plan.folder("ResNet", 0), tmp_path / "cell")
    config = replace(plan.config("ResNet", 0), out=tmp_path / "cell")
    (config.out / "gradients.json").unlink()
    before = (config.out / "metrics.json").read_text()
    said = cells.in_own_process(replace(config, lr=0.5), None, 1)
    assert "a resumed run must keep its settings, got lr 0.5" in said
    assert not (config.out / "gradients.json").exists()
    assert cells.in_own_process(config, None, 1) is None
    assert (config.out / "gradients.json").exists()
    assert (config.out / "metrics.json").read_text() == before, "the test images are looked at once"


@pytest.mark.parametrize("settings", [{"patience": 3}, {"test_with": "best"}])
def test_what_needs_validation_images_may_be_asked_for(tmp_path, settings):
    plan = experiment("table5", "smoke", tmp_path, data="digits", image_size=16, **settings)
    assert settings.items() <= experiments.to_plain(plan.config("ResNet", 0)).items()


def test_page(finished, page):
    out, _ = finished
    for table in TABLES.values():
        section = page.split(f"## {table.title} on digits, n = 1 a row")[1].split("\n## ")[0]
        for row in table.rows:
            assert section.count(f"| {row} |") >= 4, "a row in each of quality, cost, exits and gradient shares"
    for factor in FACTORS:
        assert f"**{factor.name}**: not decided by 1 seed." in page
        if factor.headline:
            (line,) = (line for line in page.split("## ")[0].splitlines() if f"**{factor.name}**" in line)
            assert "on digits, smoke): not decided by 1 seed;" in line
    untrained = next(x for x in page.split("### Exits")[-1].splitlines() if "| ResNet + feature |" in x)
    assert untrained.count(" - |") == 3, "exits without a loss of their own were never trained"
    for name in re.findall(r"\]\((plots/[^)]+\.png)\)", page):
        assert (out / name).stat().st_size > 10_000
    assert "nan" not in page


def test_the_page_prints_what_the_records_hold(finished, page):
    out, _ = finished
    results = next(r for r in records.load_results(out) if r.table == "table5")
    run = results.rows["ResNet-KL"][0]
    metrics = json.loads((out / "runs/digits/resnet-kl/seed-0/metrics.json").read_text())
    assert run.metrics == metrics
    line = next(x for x in page.split("## Table V")[1].splitlines() if "| ResNet-KL |" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["1", f"{100 * metrics['test'][-1]['accuracy']:.2f}"]
    paper = page.split("## Table V")[1].split("### The paper's figures")[1]
    assert "| ResNet-KL | 87.71 | 94.616† |" in paper


def test_the_page_says_which_epoch_was_tested_and_what_most_rows_have(finished):
    """A run may be asked to test its best epoch, and the first row to finish may be one of a fitted width."""
    results = next(r for r in records.load_results(finished[0]) if r.table == "table5")
    assert "(the last epoch's)" in tables._reading([results])
    run = results.rows["ResNet"][0]
    best = replace(results, rows={"ResNet": [replace(run, metrics=run.metrics | {"tested": "best"})]})
    assert "(the best epoch's by validation)" in tables._reading([best])
    assert "(the last epoch's or the best epoch's by validation)" in tables._reading([best, results])
    fitted = results.rows["ResNet at ResNet-KL's MACs"][0]
    assert fitted.config["width"] != run.config["width"] == 8
    rows = {"ResNet at ResNet-KL's MACs": [fitted], "ResNet + logic": results.rows["ResNet + logic"]}
    assert "width 8," in tables._setting(replace(results, rows=rows))


def test_every_resnet_kl_has_a_plain_resnet_of_its_compute(finished):
    """Their compute agrees as far as whole channels allow at these widths with one cut. The page prints the ratios."""
    for row, plain, tolerance in (
        ("ResNet-KL", "ResNet at ResNet-KL's MACs", 0.25),
        ("ResNet-KL at half MACs", "ResNet at half MACs", 0.25),
        ("ResNet-KL at ResNet's MACs", "ResNet", 0.25),
        ("ResNet + both, pruned to half", "ResNet at half MACs", 0.25),
    ):
        ours, theirs = (
            json.loads((finished[0] / f"runs/digits/{experiments.slug(name)}/seed-0/metrics.json").read_text())
            for name in (row, plain)
        )
        assert ours["size"]["macs"] == pytest.approx(theirs["size"]["macs"], rel=tolerance), row


@pytest.mark.parametrize(("classes", "images"), [(10, 60), (100, 400)])
def test_every_class_has_an_image_to_validate_on(tmp_path, monkeypatch, classes, images):
    monkeypatch.setattr(experiments.Experiment, "_seen", ((classes, 3, 32), {"train_size": 50_000, "test_size": 100}))
    assert experiment("table2", "smoke", tmp_path).config("VGG", 0).train_size == images


def test_a_scale_takes_all_images_where_there_are_fewer(tmp_path):
    """Digits have 1,438 images to train on and STL-10 has 5,000, while cpu asks for 10,000. Numbers that the caller
    gives stay."""
    plan = experiment("table4", "cpu", tmp_path, data="digits", image_size=20)
    config = plan.config("VGG", 0)
    assert (config.train_size, plan.images["train_size"], plan.shape) == (None, 1438, (10, 1, 20))
    assert len(experiments.load_data(config).train) + len(experiments.load_data(config).val) == 1438
    asked = experiment("table4", "cpu", tmp_path, data="digits", train_size=2000, test_size=900)
    assert (asked.config("VGG", 0).train_size, asked.config("VGG", 0).test_size) == (2000, 900)
    few = {"train_size": 50, "test_size": 29}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.Experiment, "_seen", ((10, 1, 16), few))
        config = experiment("table4", "smoke", tmp_path).config("VGG", 0)
    assert (config.train_size, config.test_size) == (None, None)


def test_widths_are_those_of_equal_compute(tmp_path):
    plan = experiment("table5", "cpu", tmp_path, data="digits", image_size=16, train_size=None)
    whole, half = (macs(plan.config(row, 0), *plan.shape) for row in ("ResNet", "ResNet at half MACs"))
    assert half == pytest.approx(whole / 2, rel=0.1)
    kl = plan.config("ResNet-KL at half MACs", 0)
    assert macs(kl, *plan.shape) == pytest.approx(half, rel=0.01)
    assert kl.width % 4 == 0


def test_rows_differ_in_what_they_say_alone(tmp_path):
    plan = experiment("factors", "cpu", tmp_path, data="digits", image_size=16, train_size=None)
    base = experiments.to_plain(plan.config("ResNet", 1))
    for row, changed in {
        "ResNet + T-ReLU": {"activation"},
        "ResNet + separable": {"separable"},
        "ResNet + multi-scale": {"separable", "scales"},
        "ResNet + gate": {"gate"},
        "ResNet without CutMix": {"cutmix"},
        "ResNet + feature": {"exits", "loss"},
        "ResNet at half MACs": {"width"},
        "ResNet-KL": {"model"},
        "ResNet-KL with ReLU": {"model", "activation", "prune_at"},
        "ResNet-KL at half MACs": {"model", "prune_macs", "scale_mode", "width"},
    }.items():
        own = experiments.to_plain(plan.config(row, 1))
        assert {key for key in own if own[key] != base[key]} - {"out"} == changed
    assert plan.config("ResNet", 0).seed == plan.config("ResNet-KL", 0).seed


def test_a_failing_cell_is_named_and_the_others_finish(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "broken", Row({"model": "resnet", "lr": 1e30}))
    monkeypatch.setitem(TABLES, "small", Table("Small", "digits", ("broken", "ResNet")))
    with pytest.raises(
        RunError, match=r"1 of 2 runs failed, the first: broken, seed 0: SettingsError: epoch 1.* must be finite"
    ):
        experiments.run(experiment("small", "smoke", tmp_path, image_size=16))
    assert (tmp_path / "runs/digits/resnet/seed-0/metrics.json").exists()


def test_a_row_named_twice_is_trained_once(tmp_path):
    plan, said = experiment("table5", "smoke", tmp_path, data="digits", image_size=16), []
    experiments.run(plan, jobs=2, announce=said.append, only=["ResNet", "ResNet"])
    assert said == ["Table V on digits: 1 runs, 0 done before", "ResNet, seed 0: done"]
    assert len(records.read_lines(plan.folder("ResNet", 0) / "log.jsonl")) == 2
    assert (plan.folder("ResNet", 0) / "plots/curves.png").stat().st_size > 10_000


def test_a_cell_that_fails_without_words_is_told(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise AssertionError

    sent = []
    monkeypatch.setattr(cells, "train", fails)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    settings = to_plain(Config(out=tmp_path))
    cells.train_cell(settings, torch.get_num_threads(), SimpleNamespace(send=sent.append))
    assert sent == [f"AssertionError: without a message (see {tmp_path / 'output.txt'})"]


def test_a_killed_command_takes_its_cells_with_it(tmp_path):
    """The output of the command stays open while the cell, which would train for hours, or its fork server lives."""
    (tmp_path / "long.yaml").write_text("epochs: 100000\nimage_size: 16\n")
    command = [sys.executable, "-m", "rkl", "experiments", "table5", "--data", "digits", "--scale", "smoke"]
    options = ["--rows", "ResNet", "--config", str(tmp_path / "long.yaml"), "--out", str(tmp_path)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, start_new_session=True)
    try:
        log = experiment("table5", "smoke", tmp_path, data="digits").folder("ResNet", 0) / "log.jsonl"
        deadline = time.monotonic() + 300
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert log.stat().st_size
        process.kill()
        process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_with_a_gpu_processes_are_spawned_and_see_one_device_each(tmp_path, monkeypatch):
    """A fork of a process that has initialised CUDA cannot use it, and after the imports it is too late to choose a
    device."""
    seen = []

    class Process:
        exitcode = 3

        def __init__(self, target, args):
            self.sender = args[-1]

        def start(self):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
            self.sender.send(None)

        def join(self):
            pass

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Process)
    plan = experiment("table5", "smoke", tmp_path, data="digits", image_size=16)
    assert cells.in_own_process(plan.config("ResNet", 0), device=1, threads=1) is None
    assert seen == ["7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table9", "smoke"), "table must be one of table2"),
        (("table2", "huge"), "scale must be one of smoke, cpu, full"),
        (("table2", "smoke", ".", "digits", 0), "seeds must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        experiment(*[*arguments, "."][: max(3, len(arguments))])


def test_an_empty_folder_has_no_report(tmp_path):
    with pytest.raises(RunError, match="must hold finished runs"):
        tables.write(tmp_path)


def test_published_rows_are_rows_of_the_tables():
    others = records.published()
    for name, table in others["paper"].items():
        assert table["data"] == TABLES[name].data
        assert set(table["rows"]) <= set(TABLES[name].rows)
    for public in others["public"].values():
        assert set(public["rows"]) <= set(ROWS)
        assert public["source"]


@pytest.mark.usefixtures("one_thread")
def test_gradient_norms_are_those_of_backward_and_leave_the_model_alone():
    torch.manual_seed(0)
    model = ResNetKL(classes=4, width=8, in_channels=1, image_size=16)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6) % 4
    norms = gradient_norms(model, [(images, labels)], LossWeights(heads=0.0))
    assert norms["heads"] == norms["logits"] == 0.0
    assert norms["feature"] > 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.train()
    torch.nn.functional.cross_entropy(model(images).logits[-1], labels).backward()
    squared = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    assert norms["deepest"] == pytest.approx(float(squared) ** 0.5, rel=1e-4)
    assert sum(shares(norms).values()) == pytest.approx(1)


def test_command_line(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text("image_size: 16\ntrain_size: 80\n")
    with pytest.raises(SystemExit) as stopped:
        main(["experiments", "table5", "--scale", "smoke", "--data", "nothing", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "data must be one of digits" in capsys.readouterr().err
    assert experiments.read_overrides(tmp_path / "small.yaml") == {"image_size": 16, "train_size": 80}
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2


def test_the_published_file_is_plain_yaml():
    assert set(records.published()) == {"paper", "statements", "public"}
    assert yaml.safe_dump(records.published())
