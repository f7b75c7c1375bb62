"""`gingham bench`: ratios, reasons, files. What is measured is not tested here, how it is reported is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gingham.bench import OPERATORS, main
from gingham.bench.command import measure_operator, plan
from gingham.bench.criss_cross_attention import OPERATOR, einsum_form
from gingham.bench.definition import OURS, CannotRun, Case, Function, Level, Operator, Pass, Peer, load_operator
from gingham.bench.measure import Budget, Setting, deviation, draw
from gingham.bench.memory import measure_memory
from gingham.bench.results import SCHEMA, Memory, Report, Row, Timing, Yardstick, from_json, to_json
from gingham.bench.table import (
    BEGIN,
    END,
    bytes_text,
    markdown,
    memory_table,
    ratio_text,
    seconds_text,
    split_at_markers,
    summary,
    text,
    time_table,
    write_between_markers,
)
from gingham.cli import main as gingham_command
from gingham.errors import GinghamError

CPU = torch.device("cpu")


def fake_row(**times: tuple[float, ...]) -> Row:
    return Row(
        case="1x2x3, 8/8",
        dtype="float32",
        layout="contiguous",
        threads=1,
        direction="forward",
        operations=4e9,
        moved=1e8,
        timings={name.replace("_", " "): Timing(samples) for name, samples in times.items()},
        errors={},
        failures={"flex": "cannot run: NotImplementedError: no backward."},
        other=("non-local",),
    )


def fake_report(row: Row) -> Report:
    return Report(
        operator="criss_cross_attention",
        inputs="input",
        machine={"cpu": "a processor", "cores": "2"},
        seed=7,
        peers=(OURS, "eager", "compiled", "flex", "non-local"),
        yardsticks=[Yardstick("float32", 1, matmul=100e9, copy=10e9), Yardstick("bfloat16", 1, matmul=1.0, copy=1.0)],
        rows=[row],
        memory=[Memory("1x2x3, 8/8", "float32", "contiguous", 1, "forward", {OURS: 10**6, "eager": 10**8}, "eager")],
    )


@pytest.fixture
def row() -> Row:
    timings = {OURS: (0.1, 0.9, 0.05), "eager": (0.4, 0.4, 9.0), "compiled": (0.3, 0.2, 0.35), "non-local": (0.01,) * 3}
    return fake_row(**timings)


def test_ratio_is_of_medians(row: Row) -> None:
    assert row.timings[OURS].median == 0.1
    assert row.ratio("eager") == pytest.approx(4.0)
    assert row.ratio("compiled") == pytest.approx(3.0)
    assert row.ratio("flex") is None


def test_best_peer_is_the_fastest_with_the_same_result(row: Row) -> None:
    assert row.best_peer == "compiled"
    assert row.ratio_to_best == pytest.approx(3.0)


def test_fraction_and_floor_use_the_yardstick_of_the_same_dtype(row: Row) -> None:
    yardstick = fake_report(row).yardstick(row)
    assert yardstick is not None
    assert row.fraction_of("matmul", yardstick) == pytest.approx(0.4)  # 4 GFLOP in 0.1 s, of 100 GFLOP/s
    assert row.fraction_of("copy", yardstick) == pytest.approx(0.1)  # 0.1 GB in 0.1 s, of 10 GB/s
    assert row.floor(yardstick) == pytest.approx(0.04)  # the operations, not the 10 ms that the bytes take


def test_table_shows_ratios_and_drops_no_reason(row: Row) -> None:
    report = fake_report(row)
    header, line = time_table(report)
    shown = dict(zip(header, line, strict=True))
    assert shown[OURS] == "100 ms"
    assert (shown["eager"], shown["compiled"], shown["non-local"]) == ("4.00x", "3.00x", "0.10x")
    assert (shown["best peer"], shown["of matmul"]) == ("3.00x", "40%")
    assert "flex" not in shown
    for rendered in (text(report), markdown(report)):
        assert "flex, 1 of 1 rows: cannot run: NotImplementedError: no backward." in rendered
        assert "no backward.." not in rendered
        assert "a processor" in rendered


def test_reports_survive_json(row: Row, tmp_path: Path) -> None:
    report = fake_report(row)
    assert from_json(json.loads(json.dumps(to_json(report)))) == report
    file, page = tmp_path / "measured.json", tmp_path / "page.md"
    file.write_text(json.dumps([to_json(report)]))
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert main(["--from", str(file), "--markdown", str(page)]) == 0
    assert markdown(report) in page.read_text()
    for wrong in ("{}", "[1]", "[{}]", "nothing"):
        file.write_text(wrong)
        with pytest.raises(GinghamError, match="is not what gingham bench --json writes"):
            main(["--from", str(file)])
    with pytest.raises(GinghamError, match="--from: cannot read"):
        main(["--from", str(tmp_path / "missing.json")])
    with pytest.raises(GinghamError, match="none can be chosen from what --from reads"):
        main(["roi_pool", "--from", str(file)])


@pytest.mark.parametrize(("dtype", "of_boxes"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_boxes_are_as_precise_as_the_operator_wants_them(dtype: torch.dtype, of_boxes: torch.dtype) -> None:
    operator = load_operator("roi_pool")
    case = replace(operator.cases[0], inputs=lambda _: (torch.ones(1, 2, 4, 4), torch.zeros(3, 5)))
    features, boxes = draw(operator, case, Setting(dtype, "contiguous", 1, Pass.FORWARD, CPU), 0).inputs
    assert (features.dtype, boxes.dtype) == (dtype, of_boxes)


def test_files_that_cannot_be_written_are_told_before_the_measuring(tmp_path: Path) -> None:
    for option, name, reason in (
        ("--json", "new/x.json", "there is no folder"),
        ("--json", ".", "is a folder"),
        ("--plot", "x.txt", "expected a file that ends in"),
    ):
        with pytest.raises(GinghamError, match=f"^{option} .*{reason}"):
            main(["roi_pool", option, str(tmp_path / name)])


def test_the_summary_holds_the_headline_rows(row: Row) -> None:
    headline = next(case.label for case in OPERATOR.cases if case.headline)
    report = fake_report(replace(row, case=headline))
    report.rows += [row, replace(row, case=headline, threads=2), replace(row, case=headline, layout="channels_last")]
    lines = [line for line in summary([report]).splitlines() if line.startswith("| `")]
    assert len(lines) == 1
    for part in (headline, "100 ms", "compiled", "3.00x", "eager 4.00x", "(non-local) 0.10x", "flex -"):
        assert part in lines[0]


def test_lines_of_a_table_are_aligned(row: Row) -> None:
    lines = text(fake_report(row)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("input"))
    assert len({len(line) for line in lines[start : start + 3]}) == 1


def test_without_our_operator_the_peers_show_their_times() -> None:
    row = fake_row(eager=(0.2,))
    shown = dict(zip(*time_table(fake_report(row)), strict=True))
    assert (shown[OURS], shown["eager"], shown["best peer"], shown["of matmul"]) == ("-", "200 ms", "-", "-")


def test_memory_is_a_share_of_the_baseline(row: Row) -> None:
    header, line = memory_table(fake_report(row))
    shown = dict(zip(header, line, strict=True))
    assert (shown[OURS], shown["eager"], shown["gingham of eager"]) == ("1.0 MB", "100 MB", "1.0%")


@pytest.mark.parametrize(
    ("value", "shown"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.50 us"), (1e-7, "0.10 us"), (0.25, "250 ms")]
)
def test_seconds_have_the_unit_that_fits(value: float, shown: str) -> None:
    assert seconds_text(value) == shown


def test_other_units() -> None:
    assert [ratio_text(ratio) for ratio in (None, 0.5, 12.34, 123.4)] == ["-", "0.50x", "12.3x", "123x"]
    assert [bytes_text(size) for size in (5e4, 2e6, 4e8)] == ["0.05 MB", "2.0 MB", "400 MB"]


def test_json_holds_samples_and_ratios(row: Row) -> None:
    data = json.loads(json.dumps(to_json(fake_report(row))))
    assert data["schema"] == SCHEMA
    assert data["machine"]["cpu"] == "a processor"
    (plain,) = data["rows"]
    assert plain["timings"]["eager"] == {"median": 0.4, "samples": [0.4, 0.4, 9.0]}
    assert plain["ratios"] == pytest.approx({"eager": 4.0, "compiled": 3.0, "non-local": 0.1})
    assert (plain["best_peer"], plain["threads"], plain["direction"]) == ("compiled", 1, "forward")
    assert plain["failures"] == {"flex": "cannot run: NotImplementedError: no backward."}
    assert data["memory"][0]["share"] == pytest.approx(0.01)


def test_deviation_is_relative_to_the_largest_value_and_sees_nan() -> None:
    exact = torch.tensor([10.0, -20.0], dtype=torch.float64)
    assert deviation((exact.float() + torch.tensor([0.0, 1.0]),), (exact,)) == pytest.approx(0.05)
    assert deviation((torch.tensor([math.nan, -20.0]),), (exact,)) == math.inf
    assert deviation((torch.zeros(0),), (torch.zeros(0),)) == 0.0


def test_a_share_of_the_results_may_be_undecided() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    result = exact.clone()
    result[[3, 50]], result[7] = 0.5, 0.99
    assert deviation((result,), (exact,), undecided=0.02) == pytest.approx(0.01)
    assert deviation((result,), (exact,), undecided=0.01) == pytest.approx(0.5)
    result[3] = math.nan
    assert deviation((result,), (exact,), undecided=0.02) == math.inf


def double(value: Tensor) -> Tensor:
    return value * 2


def make(function: Callable[[Tensor], Tensor]) -> Callable[[Case, torch.device], Function]:
    return lambda case, device: function


def refuse(case: Case, device: torch.device) -> Function:
    raise CannotRun("left out: a test says so")


def fail(value: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nand a second line")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_is_a_fiftieth_of_the_einsum_forms(dtype: torch.dtype) -> None:
    setting = Setting(dtype, "contiguous", 1, Pass.FORWARD, CPU)
    inexact = 400_000  # Linux counts resident pages in batches: one of three counts must do
    for _ in range(3):
        measured = measure_memory(OPERATOR, OPERATOR.case("1x97x97, 64/512"), setting, Level.QUICK)
        assert [memory.direction for memory in measured] == [Pass.FORWARD.value, Pass.TRAINING.value]
        too_much = [memory for memory in measured if memory.extra[OURS] >= memory.extra["eager"] / 50 + inexact]
        if not too_much:
            return
    pytest.fail(f"three times in turn: {too_much}")


@pytest.fixture
def doubling() -> Operator:
    work = dict.fromkeys(Pass, 16.0)
    return Operator(
        name="doubling",
        inputs="length",
        cases=(Case("16", lambda generator: (torch.randn(16, generator=generator),), work, work, level=Level.QUICK),),
        peers=(
            Peer(OURS, make(double)),
            Peer("sum", make(lambda value: value + value)),
            Peer("wrong", make(lambda value: value * 3)),
            Peer("cut off", make(lambda value: value.detach() * 2)),
            Peer("failing", make(fail)),
            Peer("refusing", refuse),
            Peer("slow", make(double), operations=lambda case, direction: 1e18),
            Peer("large", make(double), memory=lambda case, direction: 1e18),
            Peer("triple", make(lambda value: value * 3), same_result=False),
        ),
        reference=lambda case: double,
        differentiable=(0,),
        baseline="sum",
    )


@pytest.fixture
def measured(doubling: Operator, monkeypatch: pytest.MonkeyPatch) -> Report:
    stick = Yardstick("float32", 1, matmul=1e9, copy=1e9)
    monkeypatch.setattr("gingham.bench.command.measure_yardstick", lambda *_: stick)
    rows = list(plan(doubling, Level.QUICK, CPU, ["float32"], ["contiguous"], [1]))
    return measure_operator(doubling, rows, Level.QUICK, Budget(seconds=0.01, rounds=4, longest_call=1.0))


def test_peer_that_cannot_take_part_is_listed_with_its_reason(measured: Report) -> None:
    forward, training = measured.rows
    assert set(forward.timings) == {OURS, "sum", "cut off", "triple"}
    assert forward.failures["failing"] == "cannot run: RuntimeError: no kernel"
    assert forward.failures["refusing"] == "left out: a test says so"
    assert forward.failures["wrong"] == "wrong result: deviates by 0.5 of the largest value"
    assert forward.failures["slow"] == "left out: one call was expected to take more than 1 s"
    assert forward.failures["large"] == "left out: one call was expected to take more than 4 GB"
    assert training.failures["cut off"].startswith("cannot run: RuntimeError: ")
    assert set(training.timings) == {OURS, "sum", "triple"}


def test_report_names_the_machine_and_the_build(measured: Report) -> None:
    assert {"cpu", "cores", "instruction sets", "gingham", "torch", "python"} <= set(measured.machine)
    assert all(measured.machine.values())


def test_rows_record_what_was_run(measured: Report) -> None:
    forward, training = measured.rows
    assert (forward.direction, training.direction) == ("forward", "forward + backward")
    assert all(len(timing.samples) >= 3 and timing.median > 0 for timing in forward.timings.values())
    assert forward.errors[OURS] == training.errors["sum"] == 0.0
    assert forward.moved == 64.0
    assert forward.best_peer in {"sum", "cut off"}


@pytest.mark.parametrize("busy", [True, False])
def test_busy_machine_is_said_and_our_own_load_is_not(
    busy: bool, doubling: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = 1e3 if busy else 0.0

    def work(name: str) -> Operator:
        monkeypatch.setattr("os.getloadavg", lambda: (1e3, 1e3, 1e3))
        return doubling

    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("gingham.bench.command.load_operator", work)
    stick = Yardstick("float32", 1, matmul=1e9, copy=1e9)
    monkeypatch.setattr("gingham.bench.command.measure_yardstick", lambda *_: stick)
    assert main(["roi_pool", "masked_similarity", "--quick", "--seconds", "-1"]) == 0
    said = "the machine was busy when the run began (load average 1000.0 on"
    assert capsys.readouterr().out.count(said) == (2 if busy else 0)


def test_run_out_of_time_is_said_and_leaves_a_row_to_each(doubling: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    stick = Yardstick("float32", 1, matmul=1e9, copy=1e9)
    monkeypatch.setattr("gingham.bench.command.measure_yardstick", lambda *_: stick)
    rows = list(plan(doubling, Level.QUICK, CPU, ["float32"], ["contiguous"], [1]))
    report = measure_operator(doubling, rows, Level.QUICK, Budget(0.0, 1, 1.0), seconds=-1.0)
    assert len(report.rows) == 1
    assert "1 row was left out, the time for new ones being over." in text(report)


def test_plan_takes_headline_cases_in_every_setting() -> None:
    def settings(level: Level, label: str) -> int:
        rows = plan(OPERATOR, level, CPU, ["float32"], ["contiguous", "channels_last"], [1, 2])
        return sum(case.label == label for case, _ in rows)

    assert settings(Level.DEFAULT, "1x97x97, 64/512") == 2 * 2 * 2
    assert settings(Level.DEFAULT, "8x97x97, 64/512") == 2
    assert settings(Level.FULL, "8x97x97, 64/512") == 2 * 2 * 2
    assert settings(Level.QUICK, "8x97x97, 64/512") == 0


def test_operations_follow_the_formula() -> None:
    case = OPERATOR.case("1x97x97, 64/512")
    assert case.operations[Pass.FORWARD] == 2 * 97 * 97 * 193 * (64 + 512)
    assert case.operations[Pass.TRAINING] == 2 * 97 * 97 * 193 * (4 * 64 + 3 * 512)


def test_einsum_form_is_the_reference() -> None:
    from gingham.reference import criss_cross_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, c, 3, 5, generator=generator, dtype=torch.float64) for c in (4, 4, 6))
    torch.testing.assert_close(einsum_form(query, key, value), criss_cross_attention(query, key, value))


@pytest.mark.parametrize("name", OPERATORS)
def test_uncompiled_peers_of_every_operator_agree_on_its_smallest_case(name: str) -> None:
    operator = load_operator(name)
    case = min(operator.cases, key=lambda case: case.operations[Pass.FORWARD])
    inputs = case.inputs(torch.Generator().manual_seed(0))
    expected = operator.reference(case)(*(tensor.double() for tensor in inputs))
    for peer in operator.peers:
        if peer.same_result and peer.name not in {"compiled", "FlexAttention"}:
            result = peer.build(case, CPU)(*inputs)
            assert deviation((result,), (expected,)) < 1e-5, peer.name


def test_command_writes_what_it_is_asked_for(
    doubling: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gingham.bench.command.load_operator", lambda name: doubling)
    monkeypatch.setattr(
        "gingham.bench.command.measure_yardstick", lambda *_: Yardstick("float32", 1, matmul=1e9, copy=1e9)
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    picture, data = tmp_path / "ratios.svg", tmp_path / "data.json"
    options = ["--quick", "--dtype", "float32", "--threads", "1"]
    files = ["--json", str(data), "--markdown", str(page), "--plot", str(picture)]
    assert main(["criss_cross_attention", *options, *files]) == 0
    assert "doubling" in capsys.readouterr().out
    (report,) = json.loads(data.read_text())
    assert [row["direction"] for row in report["rows"]] == ["forward", "forward + backward"]
    assert page.read_text().startswith(f"before\n{BEGIN}\n`doubling` on ")
    assert page.read_text().endswith(f"\n{END}\nafter\n")
    assert "old" not in page.read_text()
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], f"operator: expected some of {', '.join(OPERATORS)}; got 'no_such'"),
        (["--dtype", "int8"], "--dtype: expected some of float32, bfloat16, float16, float64; got 'int8'"),
        (["--threads", "0"], "--threads: expected counts from 1 to"),
        (["--layout", "diagonal"], "--layout: expected some of contiguous, channels_last; got 'diagonal'"),
        (["--markdown", "missing.md"], "cannot read missing.md: No such file or directory"),
    ],
)
def test_wrong_argument_ends_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gingham_command(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gingham: error: {message}")
    assert error.count("\n") == 1


def test_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(GinghamError, match="needs one line"):
        write_between_markers(page, "tables")
    assert page.read_text() == f"{END}\n{BEGIN}\n"
    with pytest.raises(GinghamError, match="needs one line"):
        split_at_markers(page)
