"""The benchmark's bookkeeping: what it writes and says. Its times need a GPU."""

import csv
import json
from pathlib import Path

import pytest
import torch
from polar_bench import experts, kernels, peers, report
from polar_bench.measurement import Measurement
from polar_bench.peers import GemLite, Humming, Peer
from polar_bench.timing import L2_BYTES, copies_needed, time_calls


def measurement(m: int, ratio: float, shape: tuple[int, int] = (4096, 4096)) -> Measurement:
    parts = {"error": 0.001, "spread": 0.01, "bandwidth": 1e12, "bandwidth_fraction": 0.5}
    return Measurement(
        "linear", "p", "int8", *shape, m, microseconds=10.0, bf16_microseconds=10 * ratio, ratio=ratio, **parts
    )


@pytest.fixture
def result() -> report.Result:
    rows = [measurement(1, 2.0), measurement(1, 8.0, (12288, 4096)), measurement(2, 3.0)]
    wrong = Measurement("linear", "q", "int4", 4096, 4096, 1, 0.5, None, None, 10.0, None, None, None)
    versions = {"polar": "0", "torch": "0", "triton": "0"}
    return {
        **{"gpu": "Some GPU", "versions": versions, "cuda": "13", "commit": "abc", "date": "2026-01-01"},
        **{"read_bytes_per_second": 4e12, "copy_bytes_per_second": 3e12},
        "rows": [vars(row) for row in [*rows, wrong]],
    }


def test_mean_over_the_layers_counts_the_doubled_shape_twice(result: report.Result) -> None:
    assert report.mean_ratios(result) == {"p int8": {1: pytest.approx((2 * 8 * 8) ** (1 / 3)), 2: pytest.approx(3.0)}}


def test_experts_have_a_mean_and_a_chart_of_their_own(result: report.Result, tmp_path: Path) -> None:
    of_experts = vars(measurement(4, 5.0)) | {"kernel": "experts"}
    result["rows"].append(of_experts)
    assert report.mean_ratios(result, "experts") == {"p int8": {4: pytest.approx(5.0)}}
    assert 4 not in report.mean_ratios(result)["p int8"]
    path = report.write(result, tmp_path)
    assert path.with_name("kernels-some-gpu-experts.png").stat().st_size > 1000
    report.document(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "(kernels-some-gpu-experts.png)" in text
    assert "| p int8 | 5.00 |" in text


def test_no_time_for_a_wrong_result(result: report.Result) -> None:
    assert report.table(result)[-1][3:7] == ["wrong", "-", "-", "-"]


def test_files(result: report.Result, tmp_path: Path) -> None:
    path = report.write(result, tmp_path / "results")
    assert json.loads(path.read_text()) == result
    with path.with_suffix(".csv").open(newline="") as file:
        assert [row["ratio"] for row in csv.DictReader(file)] == ["2.0", "8.0", "3.0", ""]
    report.document(path.parent, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## Some GPU" in text
    for kind in ("ratio", "roofline"):
        assert f"(results/kernels-some-gpu-{kind}.png)" in text
        assert (tmp_path / "results" / f"kernels-some-gpu-{kind}.png").stat().st_size > 1000


def test_the_document_is_made_from_the_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(root / "bench")
    report.document(tmp_path / "bench" / "results", tmp_path / "docs" / "benchmarks.md")
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == (root / "docs" / "benchmarks.md").read_text()


def test_shapes_fill_the_cache_in_turns() -> None:
    for rows, columns in kernels.SHAPES:
        nbytes = rows * columns * 5 // 8
        assert copies_needed(nbytes) >= 2
        assert copies_needed(nbytes) == 16 or copies_needed(nbytes) * nbytes >= L2_BYTES


@pytest.fixture
def with_peers(result: report.Result) -> report.Result:
    """Ours takes 10 us at 1 and 2 rows, Humming 15 and 8; another has a time at 8, where ours has none."""
    times = {
        ("polar 5-bit", "int8"): {1: 10.0, 2: 10.0},
        ("Humming", "int5"): {1: 15.0, 2: 8.0},
        ("a", "int4"): {8: 1.0},
    }
    result["rows"] = [
        vars(Measurement("linear", *name, 4096, 4096, m, 0.001, time, 0.01, 20.0, 20 / time, 1e12, 0.5))
        for name, by_m in times.items()
        for m, time in by_m.items()
    ]
    return result


def test_the_peers_are_set_beside_ours(with_peers: report.Result, tmp_path: Path) -> None:
    assert report.peer_ratios(with_peers, "polar 5-bit int8") == {("Humming int5", 4096, 4096): {1: 1.5, 2: 0.8}}
    assert report.peer_ratios(with_peers, "polar 5-bit exact") == {}
    path = report.write(with_peers, tmp_path)
    assert path.with_name("kernels-some-gpu-roofline.png").stat().st_size > 1000
    report.document(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| Humming int5 | 4096x4096 | 1.50 | 0.80, slower |" in text
    assert "over that of polar 5-bit exact" not in text


def test_a_wrong_peer_is_not_set_beside_ours(with_peers: report.Result) -> None:
    for row in with_peers["rows"]:
        row["microseconds"] = None if row["provider"] == "Humming" else row["microseconds"]
    assert report.peer_ratios(with_peers, "polar 5-bit int8") == {}


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "package_version", {"humming-kernels": "0.1.19"}.get)
    found, missing = peers.installed()
    assert [peer.name for peer in found] == ["Humming"]
    assert missing == ["gemlite"]


def test_versions_of_the_peers_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "package_version", lambda name: f"{name} 1" if name != "triton" else None)
    of_humming = Measurement("linear", "Humming", "int5", 4096, 4096, 1, 0.001, 1.0, 0.01, None, None, 1e12, 0.5)
    versions = report.assemble([of_humming], (1e12, 1e12))["versions"]
    assert set(versions) == {"polar", "torch", "transformers", "humming-kernels"}


def test_kernels_of_humming_for_the_rows_that_are_measured() -> None:
    intervals = [(0, 8, {"a": 1}), (8, 16, {"a": 2}), (16, 24, {"a": 3}), (24, 1 << 30, {"a": 4})]
    assert peers.settings_for(intervals, (1, 8, 32)) == [intervals[0], intervals[3]]


def test_groups_stand_for_these_weights() -> None:
    codes = torch.arange(512).remainder(32).to(torch.uint8).view(2, 256)
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=torch.bfloat16)
    dense = peers.dense_groups(codes, scales, 16)
    assert dense.shape == codes.shape
    assert dense[0, :2].tolist() == [-8.0, -7.5]
    assert dense[0, 128:130].tolist() == [-32.0, -30.0]
    assert dense[1, -1].item() == 45.0


@pytest.mark.gpu
@pytest.mark.parametrize("peer", [GemLite(), Humming()], ids=lambda peer: peer.name)
def test_a_peer_is_right(peer: Peer) -> None:
    if not peers.package_version(peer.package):
        pytest.skip(f"{peer.package} is not installed")
    results, _ = kernels.run([(1024, 1024)], (1, 2, 8), peers=[peer])
    assert [row.M for row in results if row.provider == peer.name and row.microseconds] == [1, 2, 8]


@pytest.mark.gpu
def test_a_measurement(device: torch.device) -> None:
    results, (read, copy) = kernels.run([(1024, 1024)], [1, 8])
    assert read > 1e11
    assert copy > 1e11
    assert {row.provider for row in results} == {"cuBLAS", "polar 5-bit", "polar 4-bit", "tinygemm"}
    assert all(row.microseconds for row in results)
    x = torch.zeros(1 << 20, device=device)
    assert 0 < time_calls([lambda: x.add_(1)], replays=5).microseconds < 1e4


@pytest.mark.gpu
def test_experts() -> None:
    shape = experts.Shape(64, 512, 256, 4)
    results = experts.run(shape, (1, 128), 1e12)
    assert {(row.provider, row.mode) for row in results if row.M == 1} == {
        *((f"transformers {name}", "bf16") for name in ("grouped_mm", "batched_mm")),
        *(("torch._grouped_mm", "bf16"), ("polar 5-bit", "int8"), ("polar 5-bit", "exact")),
    }
    assert len(results) == 9  # one of them is not for many tokens
    assert all(row.ratio for row in results)
